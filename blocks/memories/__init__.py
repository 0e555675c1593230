"""Memory architectures: what is stored per head and how it is read. One file a choice."""
