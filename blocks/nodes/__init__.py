"""What recurrent cells are put together from. One file a choice."""
