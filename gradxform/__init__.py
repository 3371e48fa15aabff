"""gradxform: composable gradient transformations for JAX.

Every optimizer is θ ← θ − α·∇L with one idea added; each idea is one transformation, and `chain` makes
whole optimizers of them.

    tx = gx.chain(gx.clip_by_global_norm(1.0), gx.adamw(1e-3))
    state = tx.init(params)
    updates, state = tx.update(grads, state, params)
    params = gx.apply_updates(params, updates)

Optimizers, such as `sgd`, `adam`, `adamw` and `muon`.
Transformations, by their verbs: ``scale_by_…``, ``normalize_by_…``, ``clip_by_…``, ``add_…``, `orthogonalize`.
Around transformations: `accumulate`, `skip_nonfinite`, `observe`, `quantize_state`, `compensated` and others.
Composition: `chain`, `identity`, `by_path`, `freeze`, `glob`, `times`, `describe`.
The training loop: `step`, `apply_updates`, `live`, `get_hyperparams`, `set_hyperparams`, `metrics`.
Your own transformation: `lift`.

A name of optax, torch or Keras that does not exist here raises with what it is called here.
"""

import typing as _typing

# Optimizers
from gradxform.optimizers.adafactor import adafactor as adafactor
from gradxform.optimizers.adagrad import adagrad as adagrad
from gradxform.optimizers.adam import adam as adam
from gradxform.optimizers.adam_l2 import adam_l2 as adam_l2
from gradxform.optimizers.adamw import adamw as adamw
from gradxform.optimizers.lbfgs import lbfgs as lbfgs
from gradxform.optimizers.lion import lion as lion
from gradxform.optimizers.momentum import momentum as momentum
from gradxform.optimizers.matrix.muon import muon as muon
from gradxform.optimizers.matrix.normuon import normuon as normuon
from gradxform.optimizers.matrix.soap import soap as soap
from gradxform.optimizers.nadam import nadam as nadam
from gradxform.optimizers.noisy_sgd import noisy_sgd as noisy_sgd
from gradxform.optimizers.polyak_sgd import polyak_sgd as polyak_sgd
from gradxform.optimizers.prodigy import prodigy as prodigy
from gradxform.optimizers.rmsprop import rmsprop as rmsprop
from gradxform.optimizers.schedule_free import schedule_free as schedule_free
from gradxform.optimizers.schedule_free import schedule_free_adamw as schedule_free_adamw
from gradxform.optimizers.schedule_free import schedule_free_sgd as schedule_free_sgd
from gradxform.optimizers.sgd import sgd as sgd

# Transformations
from gradxform.optimizers.adam import scale_by_adam as scale_by_adam
from gradxform.transforms.adaptive_clipping import clip_by_average_norm as clip_by_average_norm
from gradxform.transforms.adaptive_clipping import clip_by_param_norm as clip_by_param_norm
from gradxform.transforms.adaptive_clipping import clip_by_zscore as clip_by_zscore
from gradxform.transforms.clipping import clip_by_global_norm as clip_by_global_norm
from gradxform.transforms.averaging import average_schedule_free as average_schedule_free
from gradxform.transforms.clipping import clip_by_leaf_norm as clip_by_leaf_norm
from gradxform.transforms.clipping import clip_by_leaf_rms as clip_by_leaf_rms
from gradxform.transforms.clipping import clip_by_value as clip_by_value
from gradxform.transforms.factored import normalize_by_factored_rms as normalize_by_factored_rms
from gradxform.transforms.lbfgs import scale_by_lbfgs as scale_by_lbfgs
from gradxform.transforms.momentum import bias_correction as bias_correction
from gradxform.transforms.momentum import scale_by_momentum as scale_by_momentum
from gradxform.transforms.noise import add_noise as add_noise
from gradxform.optimizers.matrix.neuron_normalization import normalize_by_neuron as normalize_by_neuron
from gradxform.transforms.normalization import normalize_by_rms as normalize_by_rms
from gradxform.transforms.normalization import normalize_by_rss as normalize_by_rss
from gradxform.optimizers.matrix.orthogonalization import orthogonalize as orthogonalize
from gradxform.transforms.polyak import scale_by_polyak as scale_by_polyak
from gradxform.transforms.scaling import scale as scale
from gradxform.transforms.scaling import scale_by_learning_rate as scale_by_learning_rate
from gradxform.transforms.scaling import scale_by_param_rms as scale_by_param_rms
from gradxform.transforms.scaling import scale_by_schedule as scale_by_schedule
from gradxform.transforms.sign import scale_by_sign as scale_by_sign
from gradxform.optimizers.matrix.soap import scale_by_soap as scale_by_soap
from gradxform.transforms.weight_decay import add_decoupled_weight_decay as add_decoupled_weight_decay
from gradxform.transforms.weight_decay import add_l2_regularization as add_l2_regularization

# Transformations around transformations
from gradxform.wrappers.accumulation import AccumulateState as AccumulateState
from gradxform.wrappers.accumulation import accumulate as accumulate
from gradxform.wrappers.low_precision import LowPrecisionState as LowPrecisionState
from gradxform.wrappers.low_precision import compensated as compensated
from gradxform.wrappers.low_precision import master_weights as master_weights
from gradxform.wrappers.low_precision import stochastic_rounding as stochastic_rounding
from gradxform.wrappers.observation import ObserveState as ObserveState
from gradxform.wrappers.observation import observe as observe
from gradxform.wrappers.quantization import Codec as Codec
from gradxform.wrappers.quantization import QuantizedState as QuantizedState
from gradxform.wrappers.quantization import quantize_state as quantize_state
from gradxform.wrappers.skipping import SkipState as SkipState
from gradxform.wrappers.skipping import skip_nonfinite as skip_nonfinite
from gradxform.wrappers.skipping import skip_spikes as skip_spikes

# Composition, and what a training loop needs
from gradxform._core.apply import apply_updates as apply_updates
from gradxform._core.apply import step as step
from gradxform._core.describe import Description as Description
from gradxform._core.describe import LeafDescription as LeafDescription
from gradxform._core.describe import describe as describe
from gradxform._core.evaluation import eval_params as eval_params
from gradxform._core.groups import by_path as by_path
from gradxform._core.groups import freeze as freeze
from gradxform._core.hyperparameters import live as live
from gradxform._core.hyperparameters import times as times
from gradxform._core.body import Transformation as Transformation
from gradxform._core.lift import chain as chain
from gradxform._core.lift import identity as identity
from gradxform._core.patterns import glob as glob
from gradxform._core.settings import get_hyperparams as get_hyperparams
from gradxform._core.settings import metrics as metrics
from gradxform._core.settings import set_hyperparams as set_hyperparams

# Your own transformation
from gradxform.rules import Measure as Measure
from gradxform.rules import Norm as Norm
from gradxform.rules import RuleState as RuleState
from gradxform.rules import Slot as Slot
from gradxform.rules import Step as Step
from gradxform.rules import finite as finite
from gradxform.rules import fraction as fraction
from gradxform.rules import lift as lift
from gradxform.rules import non_negative as non_negative
from gradxform.rules import positive as positive

if _typing.TYPE_CHECKING:
    __version__: str
else:  # hidden from type checkers, for which every name would exist

    def __getattr__(name: str) -> object:
        """``__all__``, ``__version__``; and for a name that does not exist what it is called here."""
        from gradxform._core.other_names import attribute

        return attribute(name, globals())

    def __dir__() -> list[str]:
        """The public names, the modules for authors, and what every module has."""
        return sorted(
            {*__getattr__("__all__"), "__all__", "__version__", "numerics", "rules", *filter(_special, globals())}
        )

    def _special(name: str) -> bool:
        return name.startswith("__")
