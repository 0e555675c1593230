"""The tasks a search can train on, one file each."""
