"""A run: its parts, its state, the steps, when it is saved, where it goes on."""
