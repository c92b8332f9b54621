"""`layercut.evaluate`: measure a model in memory on held-out text, by itself or against a baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

import torch

from layercut.errors import ConfigError, DataError, ModelError
from layercut.evaluation.likelihood import compared_losses, of_losses, paired_error, perplexity_protocol, window_losses
from layercut.evaluation.protocol import EvaluationFunction, Rows, measure_all, named
from layercut.models import decoder_stack
from layercut.models.memory import memory_limit
from layercut.models.runner import DecoderRunner, in_eval_mode, model_of
from layercut.plotting import axes_or_new
from layercut.progress import bar


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
        evaluations: further evaluations (`evaluation/protocol.py`): registered names, or functions.
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
    model = _model_in(model)
    models = {"model": model} if baseline is None else {"model": model, "baseline": _model_in(baseline)}
    functions = named(evaluations)
    if functions and tokenizer is None:
        raise ConfigError("evaluations are given and no tokenizer", "evaluate(…, tokenizer=tokenizer)")
    for each in models.values():
        _check_tokens(heldout, each)
    if len({each.config.get_text_config().vocab_size for each in models.values()}) > 1:
        raise ModelError("the baseline has another vocabulary than the model", "give the model that this one came from")
    tokens = heldout.long()
    with memory_limit(), in_eval_mode(*models.values()), bar("perplexity", len(models) * len(tokens)) as advance:
        if baseline is None:
            mine, theirs, kl = window_losses(model, tokens, advance=advance), None, None
        else:
            mine, theirs, kl = compared_losses(model, models["baseline"], tokens, advance=advance)
    given = {name: (lambda judged=each: judged) for name, each in models.items()}
    figures = measure_all(functions, given, tokenizer, seed=seed) if functions else {}
    return _evaluation(mine, theirs, kl, tokens=heldout.numel(), window=heldout.shape[1], evaluations=figures)


def _evaluation(mine: torch.Tensor, theirs: torch.Tensor | None, kl: torch.Tensor | None, **more: Any) -> Evaluation:
    """From the windows' losses and KL, [N] each."""
    return Evaluation(
        perplexity=of_losses(mine),
        baseline_perplexity=None if theirs is None else of_losses(theirs),
        ratio=None if theirs is None else of_losses(mine) / of_losses(theirs),
        log_ratio_error=None if theirs is None else paired_error(mine, theirs),
        kl=None if kl is None else kl.mean().item(),
        losses=tuple(mine.tolist()),
        baseline_losses=None if theirs is None else tuple(theirs.tolist()),
        **more,
    )


def _model_in(given: Any) -> Any:
    """What is given, or its `.model` where it is neither a torch module nor a runner."""
    return model_of(given if isinstance(given, torch.nn.Module | DecoderRunner) else getattr(given, "model", given))


def _check_tokens(tokens: Any, model: Any) -> None:
    """Refuse what is no [N, T] of token ids for this model."""
    ids = isinstance(tokens, torch.Tensor) and not tokens.is_floating_point() and tokens.dtype is not torch.bool
    if not ids or tokens.dim() != 2 or not len(tokens) or tokens.shape[1] < 2:
        got = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, torch.Tensor) else type(tokens).__name__
        raise DataError(
            f"the tokens are {got}; allowed are token ids [N, T], N at least 1, T at least 2",
            "layercut.token_blocks(text, tokenizer, tokens=32768) makes them",
        )
    limit = decoder_stack.positions(model.config)
    if limit and tokens.shape[1] > limit:
        raise DataError(
            f"windows of {tokens.shape[1]:,} tokens are longer than the model's {limit:,} positions",
            "give shorter windows: token_blocks(…, window=256)",
        )
    decoder_stack.check_tokens(tokens, model.config, type(model).__name__)
