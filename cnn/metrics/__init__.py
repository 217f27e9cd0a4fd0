"""Metrics: running sums on the device, and scores computed from an evaluation's predictions."""
