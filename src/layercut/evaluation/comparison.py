"""`layercut.evaluate`: measure a model in memory on held-out text, by itself or against a baseline.

And the evaluations that packages bring, run on the dense and on the compressed model in the same way. One is a function
of a model that returns figures by name. It is registered by a decorator, or by an entry point of the group
"layercut.evaluations", and asked for by `--evaluations mypackage-digits` or
`layercut.evaluate(…, evaluations=["mypackage-digits"], tokenizer=tokenizer)`:

    @layercut.evaluations.register("mypackage-digits")
    def digits(model, tokenizer, *, seed):
        prompts = make_prompts(random.Random(seed))
        return {"accuracy": …, "seconds": …}

    digits.higher_is_better = {"accuracy": True, "seconds": False}      # optional: what reports say of a change
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any, Protocol

import torch

from layercut import registries
from layercut.errors import ConfigError, DataError, ModelError
from layercut.evaluation.likelihood import compared_losses, of_losses, paired_error, perplexity_protocol, window_losses
from layercut.models import decoder_stack
from layercut.models.memory import memory_limit
from layercut.models.runner import DecoderRunner, in_eval_mode, model_of
from layercut.plotting import axes_or_new
from layercut.progress import bar

Rows = dict[str, dict[str, dict[str, Any]]]
"""Evaluation, metric -> figure by the name of a model, and "higher_is_better": bool, None where not known."""


class EvaluationFunction(Protocol):
    """What `layercut.evaluations` holds. It may have an attribute `higher_is_better`, a mapping of metric to bool."""

    def __call__(self, model: Any, tokenizer: Any, *, seed: int) -> Mapping[str, float]:
        """Measure a model."""
        ...


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `evaluate` measured. `str()` is one line, `_repr_html_` a table, `plot()` shows the windows one by one."""

    perplexity: float
    """exp of the mean loss; inf where a loss overflows or is NaN."""
    baseline_perplexity: float | None
    """The baseline's on the same tokens; None without one, as all that compares."""
    ratio: float | None
    """perplexity / baseline_perplexity."""
    log_ratio_error: float | None
    """Standard error of ln(ratio), in nats per token, from the paired differences of the windows' losses; None of
    fewer than two windows, or where a loss is not finite."""
    kl: float | None
    """KL(baseline || model), in nats per token, the mean over all predicted positions. None without a baseline, or
    where layers are on disk."""
    losses: tuple[float, ...]
    """Mean next-token loss of each window, in nats per token."""
    baseline_losses: tuple[float, ...] | None
    """The baseline's."""
    tokens: int
    """Tokens in all, N T."""
    window: int
    """Tokens in a window, T; the first of each is not predicted."""
    evaluations: Rows = field(default_factory=dict)
    """Evaluation, metric -> {"model": figure, "baseline": figure, "higher_is_better": bool or None}."""

    @property
    def ratio_error(self) -> float | None:
        """Standard error of `ratio`: ratio * log_ratio_error."""
        return None if self.ratio is None or self.log_ratio_error is None else self.ratio * self.log_ratio_error

    def to_dict(self) -> dict[str, Any]:
        """All fields, as plain Python values."""
        return asdict(self)

    def __str__(self) -> str:
        words = f"perplexity {self.perplexity:.4g}"
        if self.ratio is not None:
            error = "" if self.ratio_error is None else f" ± {self.ratio_error:.2g}"
            words += f", {self.ratio:.4g}{error} times the baseline's {self.baseline_perplexity:.4g}"
        words += "" if self.kl is None else f", KL {self.kl:.4g} nats per token"
        for name, metric, row in self._rows():
            against = f" (baseline {_figure(row['baseline'])})" if "baseline" in row else ""
            words += f", {name} {metric} {_figure(row['model'])}{against}"
        return words

    def _rows(self) -> list[tuple[str, str, dict[str, Any]]]:
        return [(name, metric, row) for name, table in self.evaluations.items() for metric, row in table.items()]

    def _repr_html_(self) -> str:
        table = [("perplexity", self.perplexity, self.baseline_perplexity)]
        table += [(f"{name}: {metric}", row["model"], row.get("baseline")) for name, metric, row in self._rows()]
        cells = "".join(
            f"<tr><th>{escape(what)}</th>{''.join(f'<td>{_figure(value)}</td>' for value in values)}</tr>"
            for what, *values in table
        )
        caption = escape(f"{perplexity_protocol(self.window)}; {self.tokens:,} tokens. {self}")
        return f"<table><caption>{caption}</caption><tr><th></th><th>model</th><th>baseline</th></tr>{cells}</table>"

    def plot(self, ax: Any = None) -> Any:
        """Draw each window's loss, over the baseline's where there is one.

        Args:
            ax: matplotlib Axes to draw on; new ones where not given.

        Returns:
            The Axes.
        """
        if self.baseline_losses is None:
            ax = axes_or_new(ax, xlabel="window", ylabel="loss, nats per token")
            ax.plot(self.losses, ".")
            return ax
        ax = axes_or_new(ax, xlabel="baseline's loss of a window, nats per token", ylabel="model's loss")
        ax.plot(self.baseline_losses, self.losses, ".")
        if ends := [loss for loss in (*self.baseline_losses, *self.losses) if math.isfinite(loss)]:
            ax.plot([min(ends), max(ends)], [min(ends), max(ends)], color="0.6", linewidth=1)
        return ax


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.5g}"


def evaluate(
    model: Any,
    heldout: torch.Tensor,
    *,
    baseline: Any = None,
    evaluations: Sequence[str | EvaluationFunction] = (),
    tokenizer: Any = None,
    seed: int = 0,
) -> Evaluation:
    """Measure a model on held-out text, by itself or against a baseline on the same tokens.

    The windows do not overlap, and the first token of each is not predicted. Perplexities are those of the command, to
    the bit. Models and tokens are left as they are.

    Args:
        model: a causal language model of transformers in memory, or what has one as `.model`, such as the result of
            `quantize` and a DecoderRunner.
        heldout: token ids [N, T], T at least 2 and no more than the model has positions; text that the model was
            neither searched nor tuned on.
        baseline: the dense model, given as `model` is; of the same vocabulary.
        evaluations: further evaluations (`evaluation/comparison.py`): registered names, or functions.
        tokenizer: handed to the evaluations, which it is needed for.
        seed: of the evaluations.

    Returns:
        An Evaluation.

    Raises:
        DataError: `heldout` is not token ids [N, T].
        ModelError: what is given as a model is none, or has no embedding for one of the tokens, or the two models have
            vocabularies of different sizes.
        ConfigError: an evaluation is unknown or returns no figures, or the tokenizer is missing.
    """

    def model_in(given: Any) -> Any:  # its `.model` where it is neither a torch module nor a runner
        own = isinstance(given, torch.nn.Module | DecoderRunner)
        return model_of(given if own else getattr(given, "model", given))

    models = {"model": model_in(model)} | ({} if baseline is None else {"baseline": model_in(baseline)})
    functions = named(evaluations)
    if functions and tokenizer is None:
        raise ConfigError("evaluations are given and no tokenizer", "evaluate(…, tokenizer=tokenizer)")
    for each in models.values():
        _check_tokens(heldout, each)
    if len({each.config.get_text_config().vocab_size for each in models.values()}) > 1:
        raise ModelError("the baseline has another vocabulary than the model", "give the model that this one came from")
    tokens, kl = heldout.long(), None
    with memory_limit(), in_eval_mode(*models.values()), bar("perplexity", len(models) * len(tokens)) as advance:
        if baseline is None:
            mine = theirs = window_losses(models["model"], tokens, advance=advance)
        else:
            mine, theirs, kl = compared_losses(models["model"], models["baseline"], tokens, advance=advance)
    given = {name: (lambda judged=each: judged) for name, each in models.items()}
    alone = baseline is None
    return Evaluation(
        perplexity=of_losses(mine),
        baseline_perplexity=None if alone else of_losses(theirs),
        ratio=None if alone else of_losses(mine) / of_losses(theirs),
        log_ratio_error=None if alone else paired_error(mine, theirs),
        kl=None if kl is None else kl.mean().item(),
        losses=tuple(mine.tolist()),
        baseline_losses=None if alone else tuple(theirs.tolist()),
        tokens=heldout.numel(),
        window=heldout.shape[1],
        evaluations=measure_all(functions, given, tokenizer, seed=seed) if functions else {},
    )


def _check_tokens(tokens: Any, model: Any) -> None:
    """Refuse what is no [N, T] of token ids for this model."""
    ids = isinstance(tokens, torch.Tensor) and not tokens.is_floating_point() and tokens.dtype is not torch.bool
    if not ids or tokens.dim() != 2 or not len(tokens) or tokens.shape[1] < 2:
        got = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, torch.Tensor) else type(tokens).__name__
        words = f"the tokens are {got}; allowed are token ids [N, T], N at least 1, T at least 2"
        raise DataError(words, "layercut.token_blocks(text, tokenizer, tokens=32768) makes them")
    limit = decoder_stack.positions(model.config)
    if limit and tokens.shape[1] > limit:
        words = f"windows of {tokens.shape[1]:,} tokens are longer than the model's {limit:,} positions"
        raise DataError(words, "give shorter windows: token_blocks(…, window=256)")
    decoder_stack.check_tokens(tokens, model.config, type(model).__name__)


# --- evaluations of packages --------------------------------------------------------------------------------


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
    with (
        in_eval_mode(model), torch.no_grad(),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):  # fmt: skip
        torch.manual_seed(seed)
        figures = evaluation(model, tokenizer, seed=seed)
    try:
        if all(isinstance(metric, str) for metric in figures):
            return {metric: float(value) for metric, value in dict(figures).items()}
    except (TypeError, ValueError):
        pass
    raise ConfigError(
        f"the evaluation {name!r} returned {type(figures).__name__} {str(figures)[:60]!r}; allowed is a mapping of "
        "metric to number",
        'such as {"accuracy": 0.5}',
    )


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
