"""The models, and the weights that they start from."""
