"""Passes that remove structure: whole heads, channels and blocks. None yet."""
