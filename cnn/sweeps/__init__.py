"""The search for good settings with many training runs."""
