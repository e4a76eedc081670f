"""Searching plans: schedules, solvers and learned tables, fitted to the model that ships."""
