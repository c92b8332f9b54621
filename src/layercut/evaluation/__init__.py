"""What survived: the figures that are reported of a model, never fed back into search or tuning.

Everything is measured on the dense and on the compressed model, on the same tokens, items and prompts: perplexity
(`likelihood.py`), greedy continuations and their health (`generation.py`), the tasks of lm-evaluation-harness
(`lm_eval_harness.py`) with the paired arithmetic of what was lost (`retention.py`), keys hidden in long text
(`passkey.py`) and values in long lists (`key_values.py`), generated tests of what a model can do (`capabilities.py`),
and the evaluations of users (`protocol.py`). The pipeline calls these and writes what they return; `evaluate`
(`comparison.py`) is for those who have a model in memory.
"""

from layercut.evaluation.capabilities import CapabilityFigures, capability_figures
from layercut.evaluation.comparison import Evaluation, evaluate
from layercut.evaluation.generation import PROMPTS, SAMPLE, generation_health, generations, replies
from layercut.evaluation.key_values import key_value_cases
from layercut.evaluation.likelihood import (
    compared_losses,
    long_windows,
    loss_by_position,
    of_losses,
    paired_error,
    perplexity,
    perplexity_by_position,
    perplexity_protocol,
    window_losses,
)
from layercut.evaluation.lm_eval_harness import Record, check_tasks, harness_version, load_tasks, score_tasks
from layercut.evaluation.passkey import cases as passkey_cases
from layercut.evaluation.passkey import lengths, passkey_grid
from layercut.evaluation.protocol import (
    EvaluationFunction,
    Rows,
    measure,
    measure_all,
    metric_rows,
    named,
)
from layercut.evaluation.retention import compare_records, compare_tasks, representative_metric, retention
from layercut.registries import source_digest

__all__ = [
    "PROMPTS",
    "SAMPLE",
    "CapabilityFigures",
    "Evaluation",
    "EvaluationFunction",
    "Record",
    "Rows",
    "capability_figures",
    "check_tasks",
    "compare_records",
    "compare_tasks",
    "compared_losses",
    "evaluate",
    "generation_health",
    "generations",
    "harness_version",
    "key_value_cases",
    "lengths",
    "load_tasks",
    "long_windows",
    "loss_by_position",
    "measure",
    "measure_all",
    "metric_rows",
    "named",
    "of_losses",
    "paired_error",
    "passkey_cases",
    "passkey_grid",
    "perplexity",
    "perplexity_by_position",
    "perplexity_protocol",
    "replies",
    "representative_metric",
    "retention",
    "score_tasks",
    "source_digest",
    "window_losses",
]
