"""What survived: the last look at a model before it is handed over; never fed back into search or tuning.

Everything is measured on the dense and on the compressed model, on the same tokens, items and prompts:
perplexity (`likelihood.py`), greedy continuations and their health (`generation.py`), the tasks of
lm-evaluation-harness (`harness.py`) with the paired arithmetic of what was lost (`retention.py`), and keys hidden in
long text (`passkey.py`). The pipeline calls these and writes what they return.
"""

from layercut.evaluation.generation import PROMPTS, generation_health, generations
from layercut.evaluation.harness import Record, check_tasks, harness_version, load_tasks, score_tasks
from layercut.evaluation.passkey import cases as passkey_cases
from layercut.evaluation.passkey import passkey_grid
from layercut.evaluation.perplexity import (
    long_windows,
    loss_by_position,
    of_losses,
    paired_error,
    perplexity,
    perplexity_by_position,
    protocol,
    window_losses,
)
from layercut.evaluation.retention import compare_records, compare_tasks, retention

__all__ = [
    "PROMPTS",
    "Record",
    "check_tasks",
    "compare_records",
    "compare_tasks",
    "generation_health",
    "generations",
    "harness_version",
    "load_tasks",
    "long_windows",
    "loss_by_position",
    "of_losses",
    "paired_error",
    "passkey_cases",
    "passkey_grid",
    "perplexity",
    "perplexity_by_position",
    "protocol",
    "retention",
    "score_tasks",
    "window_losses",
]
