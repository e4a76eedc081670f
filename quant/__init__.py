"""Passes that store or compute in fewer bits. None yet."""
