"""The drill, which tests whether a run can be stopped anywhere."""
