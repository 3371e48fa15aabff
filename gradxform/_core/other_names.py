"""What a guessed name is called here: the names of optax, torch and Keras. Loaded only when a name is looked up."""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import inspect
import re
import types
from collections.abc import Mapping
from typing import Any

import optax
import optax.contrib

_BFLOAT16 = (
    "bfloat16 needs no scaled loss; for float16 scale it yourself, and gx.skip_nonfinite leaves out what overflows"
)
_GROUPS = "here it is gx.by_path({pattern: transformation, …}, default=…)"
_LIVE = "here any number may change: a schedule is taken as it is, and gx.live(number) is set in the state"
_MEAN = "here it is gx.accumulate(tx, every=k)"
_SCHEDULE = "a schedule goes in place of a number: gx.adam(optax.cosine_decay_schedule(1e-3, 1000))"
_TREE = "a state is a tree of arrays, which any checkpoint library saves as it is"

OTHER_NAMES = {
    # optax
    "GradientTransformation": "here it is gx.Transformation",
    "GradientTransformationExtraArgs": "here it is gx.Transformation",
    "MultiSteps": _MEAN,
    "adaptive_grad_clip": "here it is gx.clip_by_param_norm(max_ratio)",
    "add_decayed_weights": "here it is gx.add_decoupled_weight_decay(weight_decay, mask)",
    "apply_every": f"{_MEAN}, which takes the mean, not the sum",
    "apply_if_finite": "here it is gx.skip_nonfinite(tx)",
    "clip": "here it is gx.clip_by_value(max_value)",
    "ema": "here it is gx.scale_by_momentum(decay, debias=True)",
    "clip_by_block_rms": "here it is gx.clip_by_leaf_rms(max_rms)",
    "global_norm": "optax.global_norm takes it of a tree, gx.observe at every step",
    "inject_hyperparams": _LIVE,
    "inject_stateful_hyperparams": _LIVE,
    "lookahead": "optax.lookahead goes around a whole optimizer, not into gx.chain: it has parameters of its own",
    "masked": "here it is gx.by_path({pattern: transformation}, default=gx.identity()), or an argument mask=",
    "multi_transform": _GROUPS,
    "nadamw": "here it is gx.adamw(learning_rate, nesterov=True)",
    "named_chain": "here it is gx.chain, whose state has one field per moment",
    "partition": _GROUPS,
    "scale_by_factored_rms": "here it is gx.normalize_by_factored_rms()",
    "scale_by_lion": "here it is gx.chain(gx.scale_by_momentum(0.99, blend=0.9), gx.scale_by_sign())",
    "scale_by_param_block_rms": "here it is gx.scale_by_param_rms()",
    "scale_by_rms": "here it is gx.normalize_by_rms(0.9, eps=0.0, eps_root=1e-8)",
    "scale_by_rss": "here it is gx.normalize_by_rss(eps=0.0, eps_root=1e-7, initial_accumulator_value=0.1)",
    "scale_by_stddev": "here it is gx.normalize_by_rms(0.9, eps=0.0, eps_root=1e-8, centered=True)",
    "schedule_free_eval_params": "here it is gx.eval_params(tx, state, params)",
    "set_to_zero": "here it is gx.freeze()",
    "skip_large_updates": "here it is gx.skip_spikes(tx)",
    "skip_not_finite": "here it is gx.skip_nonfinite(tx)",
    "stateless": "here it is gx.lift(None, update), of one array",
    "stateless_with_tree_map": "here it is gx.lift(None, update)",
    "trace": "here it is gx.scale_by_momentum(decay, dampening=0.0)",
    "with_extra_args_support": "every transformation here takes extra arguments",
    "zero_nans": "gx.skip_nonfinite leaves out the whole step; optax.zero_nans works in gx.chain as it is",
    # torch
    "GradScaler": _BFLOAT16,
    "add_param_group": _GROUPS,
    "autocast": _BFLOAT16,
    "clip_grad_norm": "here it is gx.clip_by_global_norm(max_norm), first in gx.chain",
    "clip_grad_norm_": "here it is gx.clip_by_global_norm(max_norm), first in gx.chain",
    "clip_grad_value_": "here it is gx.clip_by_value(max_value), first in gx.chain",
    "load_state_dict": _TREE,
    "lr_scheduler": _SCHEDULE,
    "param_groups": _GROUPS,
    "state_dict": _TREE,
    "zero_grad": "there is nothing to set to zero: jax.grad makes every gradient anew",
    # Keras
    "LossScaleOptimizer": _BFLOAT16,
    "apply_gradients": "here it is gx.step(tx, grads, state, params)",
    "clip_by_norm": "here it is gx.clip_by_leaf_norm(max_norm)",
    "clipnorm": "here it is gx.clip_by_leaf_norm(max_norm), first in gx.chain",
    "clipvalue": "here it is gx.clip_by_value(max_value), first in gx.chain",
    "exclude_from_weight_decay": "here it is the argument mask= of gx.adamw",
    "global_clipnorm": "here it is gx.clip_by_global_norm(max_norm), first in gx.chain",
    "gradient_accumulation_steps": _MEAN,
    "minimize": "here it is gx.step(tx, grads, state, params)",
    # what else people write
    "add_weight_decay": "here it is gx.add_decoupled_weight_decay(weight_decay, mask)",
    "init": "a transformation has it: gx.adam(1e-3).init(params)",
    "lr_schedule": _SCHEDULE,
    "schedule": _SCHEDULE,
    "update": "a transformation has it: gx.adam(1e-3).update(grads, state, params)",
    "weight_decay": "here it is gx.add_decoupled_weight_decay(weight_decay, mask)",
}
"""What to say of names that do not exist; those of the library are written ``gx.name``."""


def attribute(name: str, surface: Mapping[str, Any]) -> Any:
    """An attribute of the package that is made on demand; raises for an unknown name, and says what to write instead.

    Args:
      name: The attribute.
      surface: What the package's file imports, by name.
    """
    if name == "__all__":
        return public_names(surface)
    if name == "__version__":
        return _version()
    known = name[0] == "_" or importlib.util.find_spec(
        f"gradxform.{name}"
    )  # ``from gradxform import …`` asks here first
    raise AttributeError(f"gradxform has no {name!r}{'' if known else _said(name, public_names(surface))}")


def public_names(surface: Mapping[str, Any]) -> list[str]:
    """The names that users import, in the order of the package's file."""
    return [name for name, value in surface.items() if name[0] != "_" and not isinstance(value, types.ModuleType)]


def _version() -> str:
    """The installed version; a checkout that is not installed has none."""
    try:
        return importlib.metadata.version("gradxform")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"


def _said(name: str, public: list[str]) -> str:
    """The rest of a message that says that a name does not exist."""
    forms = [name, name.lower(), re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()]  # AdamW, ScaleByAdam
    if ours := next((form for form in forms if form in public), None):
        return f": here it is gx.{ours}"
    if told := next((OTHER_NAMES[form] for form in forms if form in OTHER_NAMES), None):
        return f": {told}"
    if told := next(filter(None, map(_of_optax, forms)), None):
        return f": {told}"
    near = difflib.get_close_matches(name, public, n=3)
    return f": did you mean {' or '.join(f'gx.{match}' for match in near)}?" if near else ""


def _of_optax(name: str) -> str | None:
    """Where optax has a name, and how it is used here."""
    for module in (optax, optax.contrib):
        value = vars(module).get(name)  # which has none of those that optax deprecates
        if value is None:
            continue
        where = f"{module.__name__}.{name}"
        if isinstance(value, types.ModuleType | type):
            return f"it is optax's, {where}"
        if name.endswith(("schedule", "schedules", "_decay")):
            return f"{where} makes a schedule, which goes in place of a number, as in gx.adam({where}(…))"
        return f"{where} works in gx.chain as it is" if _makes_transformation(value) else f"use {where} as it is"
    return None


def _makes_transformation(function: Any) -> bool:
    """Whether a function of optax's returns a transformation, as far as its signature or its name tells."""
    made = str(inspect.signature(function).return_annotation) if inspect.isfunction(function) else ""
    return "GradientTransformation" in made or function.__name__.startswith("scale_by_")
