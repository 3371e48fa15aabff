"""Against steps that low-precision parameters round away: float32 values behind narrower parameters."""

from gradxform.wrappers.low_precision.forms import compensated, master_weights, stochastic_rounding
from gradxform.wrappers.low_precision.lifting import LowPrecisionState

__all__ = ["LowPrecisionState", "compensated", "master_weights", "stochastic_rounding"]
