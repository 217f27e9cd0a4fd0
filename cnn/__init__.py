"""Train an image classifier; stop at any instant; go on as if nothing had happened."""
