"""What a run needs besides data, model and mathematics; one subject a file."""
