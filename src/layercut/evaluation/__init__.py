"""Figures that are reported of a model, never fed back into search or tuning.

Everything is measured on the dense and on the pruned model, on the same tokens, items and prompts.
"""

from layercut.evaluation.comparison import (
    Evaluation,
    EvaluationFunction,
    Rows,
    evaluate,
    measure,
    measure_all,
    metric_rows,
    named,
)
from layercut.evaluation.generation import PROMPTS, SAMPLE, generation_health, generations, replies
from layercut.evaluation.likelihood import (
    long_windows,
    loss_by_position,
    of_losses,
    paired_error,
    perplexity,
    perplexity_by_position,
    perplexity_protocol,
    window_losses,
)
from layercut.evaluation.probe_scores import CapabilityFigures, capability_figures, retrieval_grid
from layercut.evaluation.tasks import check_tasks, compare_tasks, harness_version, load_tasks, score_tasks
from layercut.registries import source_digest

__all__ = [
    "PROMPTS", "SAMPLE", "CapabilityFigures", "Evaluation", "EvaluationFunction", "Rows", "capability_figures",
    "check_tasks", "compare_tasks", "evaluate", "generation_health", "generations", "harness_version", "load_tasks",
    "long_windows", "loss_by_position", "measure", "measure_all", "metric_rows", "named", "of_losses", "paired_error",
    "perplexity", "perplexity_by_position", "perplexity_protocol", "replies", "retrieval_grid", "score_tasks",
    "source_digest", "window_losses",
]  # fmt: skip
