"""Attentional biases: the losses that memories descend. One file a choice."""
