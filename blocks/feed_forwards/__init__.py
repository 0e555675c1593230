"""Channel mixers. One file a choice."""
