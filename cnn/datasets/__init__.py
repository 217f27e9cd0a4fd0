"""What data there is, and how batches of it come."""
