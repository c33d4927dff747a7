"""Decisions of the data plane as pure functions of values."""
