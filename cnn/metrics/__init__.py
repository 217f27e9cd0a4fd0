"""Figures: sums that stay on the device, and what an evaluation's predictions amount to."""
