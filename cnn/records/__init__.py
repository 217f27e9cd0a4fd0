"""What a run leaves to be looked at, and what is said of several runs."""
