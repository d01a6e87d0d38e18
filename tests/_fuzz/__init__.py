"""Random configurations, their run through upstream and through fastprob, and the comparison.

`families` and `cases` say what is configured, `sides` runs it on one side, `compare` runs both and
fails where they differ, but for what `rules` names; `truth` judges fastprob alone.
"""

from tests._fuzz.cases import Case, cases
from tests._fuzz.compare import check
from tests._fuzz.families import FUSED, MODE, RANDOM, Draw
from tests._fuzz.rules import Mismatch

__all__ = ["FUSED", "MODE", "RANDOM", "Case", "Draw", "Mismatch", "cases", "check"]
