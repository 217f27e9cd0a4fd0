"""A training run: its parts, its state, its steps, how it is saved and how it is resumed."""
