"""Helpers that every other package may use: files, folders, log, signals, seeds; one subject a
file.
"""
