"""The metrics that judge a model without training it, one file each."""
