"""Transformations, one idea a file."""
