"""Position laws on queries and keys. One file a choice."""
