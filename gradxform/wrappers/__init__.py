"""Transformations around transformations: when they run, on what numbers, and what is told of it."""
