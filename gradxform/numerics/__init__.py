"""Arithmetic on one array that keeps its promises, for authors of rules: no overflow, no cancellation, no 0/0."""

from gradxform.numerics.arithmetic import (
    abs_squared,
    cast,
    clamp,
    largest_square,
    lerp,
    one_minus_power,
    real_dtype,
    root,
    smallest_normal,
    zero_if_finite,
)
from gradxform.numerics.norms import factor_to, norm
from gradxform.numerics.rounding import random_bits, round_to, rounded_at_random, seed_for

__all__ = [
    "abs_squared",
    "cast",
    "clamp",
    "factor_to",
    "largest_square",
    "lerp",
    "norm",
    "one_minus_power",
    "random_bits",
    "real_dtype",
    "root",
    "round_to",
    "rounded_at_random",
    "seed_for",
    "smallest_normal",
    "zero_if_finite",
]
