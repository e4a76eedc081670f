"""Passes that teach a smaller or faster model from a larger one. None yet."""
