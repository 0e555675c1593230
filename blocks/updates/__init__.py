"""Update rules: how the weights of a memory move. One file a choice."""
