"""Many runs: a search for settings."""
