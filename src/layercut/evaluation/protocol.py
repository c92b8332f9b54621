"""The protocol of a user's evaluation, and how it is run: on the dense and on the compressed model in the same way.

An evaluation is a function of a model that returns figures by name. It is registered by a decorator, or by an entry
point of the group "layercut.evaluations", and asked for by `--evaluations mypackage-digits` or
`layercut.evaluate(…, evaluations=["mypackage-digits"], tokenizer=tokenizer)`:

    @layercut.evaluations.register("mypackage-digits")
    def digits(model, tokenizer, *, seed):
        prompts = make_prompts(random.Random(seed))
        return {"accuracy": …, "seconds": …}

    digits.higher_is_better = {"accuracy": True, "seconds": False}      # optional: what reports say of a change
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from layercut import registries
from layercut.errors import ConfigError
from layercut.models.runner import in_eval_mode
from layercut.progress import bar


class EvaluationFunction(Protocol):
    """What `layercut.evaluations` holds. It may have an attribute `higher_is_better`, a mapping of metric to bool."""

    def __call__(self, model: Any, tokenizer: Any, *, seed: int) -> Mapping[str, float]:
        """Measure a model."""
        ...


def named(evaluations: Sequence[str | EvaluationFunction]) -> dict[str, EvaluationFunction]:
    """Functions by name: names are looked up in the registry, a function of one's own is called what it is called."""
    found: dict[str, EvaluationFunction] = {}
    for given in evaluations:
        name = given if isinstance(given, str) else getattr(given, "__name__", type(given).__name__)
        if name in found:
            raise ConfigError(f"two evaluations are called {name!r}", "give each once, and under a name of its own")
        found[name] = registries.evaluations.get(given) if isinstance(given, str) else given
    return found


def measure(name: str, evaluation: EvaluationFunction, model: Any, tokenizer: Any, *, seed: int) -> dict[str, float]:
    """Run one evaluation on one model."""
    device = next(model.parameters()).device
    on = [device] if device.type == "cuda" else []
    with in_eval_mode(model), torch.no_grad(), torch.random.fork_rng(devices=on):
        torch.manual_seed(seed)
        figures = evaluation(model, tokenizer, seed=seed)
    try:
        return {_text(metric): float(value) for metric, value in dict(figures).items()}
    except (TypeError, ValueError):
        got = f"{type(figures).__name__} {str(figures)[:60]!r}"
        raise ConfigError(
            f"the evaluation {name!r} returned {got}; allowed is a mapping of metric to number",
            'such as {"accuracy": 0.5}',
        ) from None


def _text(metric: Any) -> str:
    if not isinstance(metric, str):
        raise TypeError
    return metric


Rows = dict[str, dict[str, dict[str, Any]]]
"""Evaluation, metric -> figure by the name of a model, and "higher_is_better": bool, None where not known."""


def measure_all(
    evaluations: Mapping[str, EvaluationFunction], models: Mapping[str, Callable[[], Any]], tokenizer: Any, *, seed: int
) -> Rows:
    """Run evaluations on models, each of which is made when its turn comes."""
    figures: dict[str, dict[str, dict[str, float]]] = {name: {} for name in evaluations}
    with bar("evaluations", len(models) * len(evaluations)) as advance:
        for which, model in models.items():
            judged = model()
            for name, evaluation in evaluations.items():
                figures[name][which] = measure(name, evaluation, judged, tokenizer, seed=seed)
                advance(1, f"{name}, {which}")
    return {name: metric_rows(evaluations[name], of_models) for name, of_models in figures.items()}


def metric_rows(
    evaluation: EvaluationFunction, figures: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, Any]]:
    """One evaluation's figures by model, as one row a metric."""
    better = getattr(evaluation, "higher_is_better", {})
    metrics = dict.fromkeys(metric for each in figures.values() for metric in each)
    return {
        metric: {which: each.get(metric) for which, each in figures.items()} | {"higher_is_better": better.get(metric)}
        for metric in metrics
    }
