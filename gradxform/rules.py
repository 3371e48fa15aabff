"""For authors of transformations: a rule for one array, and what it is made of.

`lift` makes a transformation of a rule; `fraction`, `non_negative` and `positive` give its hyperparameters their
ranges; `gradxform.numerics` has the arithmetic that keeps the library's promises.
"""

from gradxform._core.hyperparameters import Option, fraction, non_negative, positive
from gradxform._core.lift import lift
from gradxform._core.rule import Measure, RuleState, Step

__all__ = ["Measure", "Option", "RuleState", "Step", "fraction", "lift", "non_negative", "positive"]
