"""Optimizers, each a composition of transformations."""
