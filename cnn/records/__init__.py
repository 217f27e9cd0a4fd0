"""The files that a run leaves, the comparison of runs, and the learning-rate range test."""
