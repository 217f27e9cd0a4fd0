"""Helpers for the other packages: files, folders, log, signals, seeds; one subject per file."""
