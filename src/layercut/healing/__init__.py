"""Healing: bring a cut model back towards the dense one, by least squares and by training the layers beside the cut.

Fourth stage of the journey. Only the layers beside a cut change, and only where held-out text says that it helps.
"""

from layercut.healing.endpoint_tuning import tune_
from layercut.healing.least_squares import FoldResult, fold_
from layercut.healing.tuning_state import TuningResult

__all__ = ["FoldResult", "TuningResult", "fold_", "tune_"]
