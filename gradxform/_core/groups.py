"""Groups of leaves by their paths, each with an optimizer of its own, other numbers, or none."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import optax

from gradxform._core.arguments import flag, is_a
from gradxform._core.body import Transformation
from gradxform._core.chain import chain_of
from gradxform._core.lift import stages_of
from gradxform._core.masks import MaskLike, Predicate, mask_of
from gradxform._core.patterns import Key, Table, pattern_of
from gradxform._core.rule import Array, Rule, RuleState, Step, stateless
from gradxform._core.stages import Group, Groups, Stage, shown_in
from gradxform.numerics.arithmetic import no_update


def by_path(
    groups: Mapping[
        str | re.Pattern[str] | Callable[[str, Any], bool], optax.GradientTransformation | Mapping[str, Any]
    ],
    default: optax.GradientTransformation | None = None,
    *,
    joint_norm: bool = True,
) -> Transformation:
    """u ← txₖ(u) on the leaves of group k: an optimizer, other hyperparameters or `freeze` for every path pattern.

    Paths are written ``encoder/0/kernel``, the same for dicts, lists, named tuples and the parameters of Flax
    Linen, Flax NNX, Haiku and Equinox.

    Args:
      groups: For each pattern one of

        - a transformation, which sees the leaves of its group only, and may be another `by_path` for them;
        - a dict of overrides: the default with other hyperparameters, by the names they have there, such as
          ``{"weight_decay": 0.0}`` or ``{"learning_rate": gx.times(0.1)}``;
        - `freeze`.

        A pattern is a regular expression for the whole path, a string or compiled; `glob` makes one of wildcards. A
        function ``(path, leaf) -> bool`` may take its place, such as ``lambda path, leaf: leaf.ndim == 2``.
      default: The transformation of the leaves that no pattern matches; None if there must be no such leaf.
      joint_norm: Whether groups that clip by a norm over all leaves share one norm; False for a norm per group.
        Transformations of other libraries always take the norm of their own group.

    Returns:
      A transformation with one state; hyperparameters of a group show as ``<pattern>/learning_rate``, or after the
      name of its function.

    Raises:
      TypeError, ValueError: if a group is none of these, an override names no hyperparameter of the default or is
        out of its range, and in `init` and ``update`` if a leaf has no group or two or a pattern matches no leaf.

    References:
      Layer-wise decay: Clark et al. 2020, arXiv 2003.10555; widths: Yang et al. 2022, arXiv 2203.03466, table 8.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> tx = gx.by_path(
      ...     {
      ...         ".*bias": {"weight_decay": 0.0},
      ...         "head/kernel": {"learning_rate": gx.times(0.5)},
      ...         "embed": gx.freeze(),
      ...     },
      ...     default=gx.adamw(gx.live(0.1), weight_decay=0.01),
      ... )
      >>> params = {"embed": jnp.ones(2), "head": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}, "w": jnp.ones(2)}
      >>> state = tx.init(params)
      >>> print(state.mu["embed"], state.hyperparams)
      MaskedNode() {'learning_rate': Array(0.1, dtype=float32), 'head/kernel/learning_rate': Array(0.05, dtype=float32)}
    """
    if not is_a(groups, Mapping) or not groups:
        raise TypeError(f"groups must be a dict from patterns to transformations or overrides, got {groups!r}")
    table = Table("by_path", tuple(map(_key, groups)), has_default=default is not None)
    base = () if default is None else stages_of("default", default)
    members = [
        _overridden(name, value, base, default) if isinstance(value, Mapping) else own_group(name, value)
        for name, value in zip(table.names(), groups.values(), strict=True)
    ]
    if default is not None:
        members.append(Group(base, default))
    stage = Groups(table, tuple(members), flag("joint_norm", joint_norm))
    stage.expanded()  # raises where the groups do not fit together
    return Transformation.of(chain_of((stage,)))


def freeze(mask: MaskLike | None = None) -> Transformation:
    """u ← −0: the parameter stays as it is, to the bit, and has no state and no part in a global norm.

    In a chain, the leaves are frozen for all its transformations, those before and after it. They may be of any dtype,
    such as an int8 base under float adapters; their gradients may be anything, also None or float0.

    Args:
      mask: Which leaves are frozen; see `add_decoupled_weight_decay`. Default all.

    Raises:
      TypeError, ValueError: see `add_decoupled_weight_decay`.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradxform as gx
      >>> tx = gx.chain(gx.clip_by_global_norm(1.0), gx.freeze("embed"), gx.sgd(0.1))
      >>> params = {"embed": jnp.ones(2), "w": jnp.ones(1)}
      >>> updates, _ = tx.update({"embed": jnp.full(2, 1e9), "w": jnp.full(1, 0.5)}, tx.init(params), params)
      >>> print(updates["embed"], updates["w"])
      [-0. -0.] [-0.05]
    """
    return Transformation.of(chain_of((Rule("freeze", freeze, stateless, _stay, mask=mask_of(mask), freezes=True),)))


def _stay(update: Array, state: RuleState, param: Array | None, step: Step) -> tuple[Array, RuleState]:
    return no_update(update), state


def own_group(name: str, value: Any) -> Group:
    """A group with a transformation of its own, whose hyperparameters show with the group's name before theirs."""
    stages = stages_of(f"the group {name!r}", value)
    return Group(shown_in(name, stages), value)


def _overridden(name: str, changes: Mapping[str, Any], base: tuple[Stage, ...], default: Any) -> Group:
    """A group that has the default with other hyperparameters."""
    if default is None:
        raise ValueError(f"the group {name!r} overrides hyperparameters of the default: give default=")
    rules = [stage for stage in base if isinstance(stage, Rule)]
    known = {str(h.name): h for rule in rules for h in rule.hyperparameters}
    for key in changes:
        if key not in known:
            whole = next((stage for stage in base if not isinstance(stage, Rule)), None)
            hint = f"; overrides do not reach into {whole!r}: put by_path into it" if whole else ""
            raise ValueError(
                f"the group {name!r} overrides {key!r}; the default has {', '.join(map(repr, known)) or 'none'}{hint}"
            )
    stages = tuple(stage.override(changes, name) if isinstance(stage, Rule) else stage for stage in base)
    return Group(stages, dict(changes))


def _key(given: Any) -> Key:
    """What tells the leaves of a group: a path pattern, or a function of path and leaf."""
    if isinstance(given, str | re.Pattern) or not callable(given):
        return pattern_of("by_path", given)
    key = mask_of(given)
    if not isinstance(key, Predicate):
        raise TypeError(f"by_path: {key!r} must be a function (path, leaf) -> bool, which is called for each leaf")
    return key
