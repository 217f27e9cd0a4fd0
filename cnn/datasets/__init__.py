"""Datasets, their preprocessing and augmentation, and the loaders of batches."""
