"""What models there are, and the weights that they begin from."""
