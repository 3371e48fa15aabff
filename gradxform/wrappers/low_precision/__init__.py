"""Against steps that low-precision parameters round away: float32 values behind narrower parameters."""

from gradxform.wrappers.low_precision.lifting import LowPrecisionState
from gradxform.wrappers.low_precision.low_precision import compensated, master_weights, stochastic_rounding

__all__ = ["LowPrecisionState", "compensated", "master_weights", "stochastic_rounding"]
