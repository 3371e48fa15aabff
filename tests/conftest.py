"""Hostile settings for every test: nothing promotes, broadcasts or warns in silence."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("MPLBACKEND", "agg")

import hypothesis
import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Each example compiles: CI draws 15 on the oldest Python, and 6 where it checks the newest Python and JAX.
EXAMPLES = 15 if sys.version_info < (3, 12) else 6
hypothesis.settings.register_profile("short", max_examples=EXAMPLES, deadline=None, derandomize=True)
hypothesis.settings.register_profile("long", max_examples=500, deadline=None)
hypothesis.settings.load_profile("long" if os.environ.get("GRADXFORM_LONG") else "short")
