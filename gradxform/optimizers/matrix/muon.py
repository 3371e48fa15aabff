"""SGD with momentum whose steps have equal singular values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optax

from gradxform._core.body import Transformation
from gradxform._core.hyperparameters import Numeric, fraction
from gradxform._core.lift import chain
from gradxform.optimizers.matrix.matrices import Matrices, by_layout
from gradxform.optimizers.matrix.orthogonalization import orthogonalize
from gradxform.transforms.momentum import scale_by_momentum
from gradxform.transforms.scaling import scale_by_learning_rate
from gradxform.transforms.weight_decay import add_decoupled_weight_decay


def muon(
    learning_rate: Numeric,
    matrices: Matrices,
    other: optax.GradientTransformation | None = None,
    *,
    beta: Numeric = 0.95,
    nesterov: bool = True,
    weight_decay: Numeric = 0.0,
    method: str = "newton_schulz",
    steps: int = 5,
    coefficients: Sequence[float] | Sequence[Sequence[float]] | None = None,
    scale: str | None = "jordan",
    eps: Numeric = 1e-7,
    dtype: Any = None,
    batched: bool | None = None,
    state_dtype: Any = None,
) -> Transformation:
    """m ← β·m + (1 − β)·g,  U·S·Vᵀ = β·m + (1 − β)·g,  θ ← θ − α·(s·U·Vᵀ + λ·θ), for hidden matrices.

    Embeddings, heads, biases and the scales of norms go to another optimizer. No leaf is taken for a hidden matrix
    merely because it has two axes: ``matrices`` says which are. `describe` shows what each leaf gets.

    Args:
      learning_rate: α ≥ 0; see `sgd`. About 0.02 with the scale ``"jordan"``, that of AdamW with ``"adam_rms"``.
      matrices: The layout of the leaves that a path pattern matches, such as
        ``{".*/kernel": "in out", "layers/qkv": "each in 3*out"}``; one pattern alone has the layout ``in out``, that of
        Flax and Haiku (``{".*/weight": "out in"}`` in Equinox). See `by_path` for patterns and `orthogonalize` for
        layouts; a pattern that is a leaf's whole path goes before others.
      other: The transformation for all other leaves, such as ``adamw(3e-4)``; None if there must be no such leaf. Its
        hyperparameters have names that begin with ``other/``.
      beta: β in [0, 1).
      nesterov: Orthogonalise the lookahead, as above; False for m.
      weight_decay: λ ≥ 0 of the matrices, multiplied by α, not by s. Jordan uses 0, Liu et al. 0.1.
      method, steps, coefficients, scale, eps, dtype, batched: See `orthogonalize`.
      state_dtype: Dtype of the momentum; see `scale_by_momentum`.

    Raises:
      TypeError, ValueError: see `orthogonalize` and `by_path`; and in `init` and ``update`` if a leaf has not its
        layout, or if a pattern that is not its whole path takes what looks like an embedding or a head:

        - a word in its path ends in *emb*, *embed*, *embedding* and the like, begins with *vocab* or *classif*,
          contains *logit*, or is *wte*, *wpe* or *codebook*;
        - a part of its path ends with the word *head*, *token* or *position* (*multi_head* does not count), or tells a
          table of positions in another way;
        - a part is *output*, *readout*, *prediction*, *final* or *last*, alone or with words such as *layer* and
          *proj*, and neither inside a block, a numbered layer or an attention, nor beside a query; or it is *out* at
          the top;
        - outside blocks, one of its matrices has an axis of 4096 or more that is 16 times the other or more.

        Other names and shapes tell nothing. What a pattern took is logged once, at INFO (logger ``gradxform``).

    References:
      Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; Liu et al. 2025, arXiv 2502.16982
      (weight decay, adam_rms).

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> tx = gx.muon(0.02, ".*/kernel", gx.adamw(3e-4))
      >>> state = tx.init({"hidden": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}, "embed": jnp.ones((9, 4))})
      >>> shown = gx.get_hyperparams(state, tx)
      >>> print(shown["learning_rate"], shown["other/learning_rate"])
      0.02 0.0003
    """

    def on(layout: str) -> Transformation:
        return chain(
            scale_by_momentum(fraction(beta, "beta"), nesterov=nesterov, state_dtype=state_dtype),
            orthogonalize(
                layout,
                method=method,
                steps=steps,
                coefficients=coefficients,
                scale=scale,
                eps=eps,
                dtype=dtype,
                batched=batched,
            ),
            add_decoupled_weight_decay(weight_decay),
            scale_by_learning_rate(learning_rate),
        )

    return by_layout("muon", matrices, on, other)
