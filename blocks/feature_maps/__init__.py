"""Feature maps of queries and keys. One file a choice."""
