"""For authors of transformations: a rule for one array, and what it is made of.

`lift` makes a transformation of a rule; `finite`, `fraction`, `non_negative` and `positive` give its hyperparameters
their ranges; `gradxform.numerics` has the arithmetic that keeps the library's promises.
"""

from gradxform._core.hyperparameters import finite, fraction, non_negative, positive
from gradxform._core.lift import lift
from gradxform._core.rule import Measure, RuleState, Slot, Step
from gradxform._core.totals import Norm

__all__ = [
    "Measure",
    "Norm",
    "RuleState",
    "Slot",
    "Step",
    "finite",
    "fraction",
    "lift",
    "non_negative",
    "positive",
]
