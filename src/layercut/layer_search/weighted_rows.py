"""Text and probes as one set of rows: the cost that sees what a user needs.

    J(S) = KL_text(S) + weight · mean_c KL_c(S)

KL_text is the mean over all tokens of text, KL_c that over the answers' tokens of capability c (`data/probes.py`), both
of KL(dense || cut), in nats per token. Each row carries a weight for every position, so that J is the plain mean of the
rows' costs, sum_t w_t KL_t: whatever goes by rows (the estimate, the race) minimises J and need not know. Rows of text
and of probes stand in turn until the fewer run out, and the mean of the first rows is taken of each kind by itself:
few rows see both, or they would propose what is cheap on text alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from layercut.data.probes import ProbeRows
from layercut.errors import DataError
from layercut.models.decoder_stack import check_tokens, positions
from layercut.models.runner import DecoderRunner


@dataclass(frozen=True)
class WeightedRows:
    """Rows of tokens, and what each position counts in the cost of its row."""

    tokens: torch.Tensor  # int64 [N, T]
    weights: torch.Tensor | None  # float32 [N, T]; None: the cost of a row is the mean over its tokens
    is_text: torch.Tensor  # bool [N]
    probe_weight: float = 0.0  # what the KL on probes counts in the mean

    def part(self, costs: torch.Tensor, *, text: bool) -> torch.Tensor:
        """The share of the mean that text has, KL_text, or that probes have, mean_c KL_c, each in its own unit."""
        share = costs[:, self.is_text if text else ~self.is_text].sum(-1) / len(self.is_text)
        return share if text else share / self.probe_weight

    def mean(self, costs: torch.Tensor, probes: float = 1.0) -> torch.Tensor:
        """J by the first rows: of each kind its share of all rows times its mean over those that are there.

        probes: how many times as much they count.
        """
        is_text, total = self.is_text[: costs.shape[1]], len(self.is_text)
        found = torch.zeros(len(costs), dtype=costs.dtype)
        for kind in (True, False):
            some = costs[:, is_text == kind]
            if some.shape[1]:
                share = int((self.is_text == kind).sum()) / total
                found += some.mean(-1) * (share if kind else probes * share)
        return found

    def text_only(self, rows: int) -> torch.Tensor:
        """Which of the first rows are text, as indices."""
        return self.is_text[:rows].nonzero()[:, 0]


def probes_alone(probes: ProbeRows) -> WeightedRows:
    """Rows of probes without text: the mean of their costs is weight · mean_c KL_c."""
    none = torch.zeros(len(probes.tokens), dtype=torch.bool)
    return WeightedRows(probes.tokens, probes.weights() * probes.weight, none, probes.weight)


def weighted_rows(text: torch.Tensor, probes: ProbeRows | None) -> WeightedRows:
    """Rows of text and of probes, in turn."""
    if probes is None or not probes.names or probes.weight == 0:
        return WeightedRows(text, None, torch.ones(len(text), dtype=torch.bool))
    texts, others = len(text), len(probes.tokens)
    total, longest = texts + others, max(text.shape[1], probes.tokens.shape[1])
    even = torch.full(text.shape, total / texts / text.shape[1])
    weighed = probes.weights() * (probes.weight * total / others)
    order = torch.cat([torch.arange(texts) * 2, torch.arange(others) * 2 + 1]).argsort()

    def joined(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.cat([F.pad(x, (0, longest - x.shape[1])) for x in (a, b)])[order]

    is_text = (torch.arange(total) < texts)[order]
    tokens = joined(text.cpu(), probes.tokens.to(text.dtype))
    return WeightedRows(tokens, joined(even, weighed), is_text, probes.weight)


def check_calibration(runner: DecoderRunner, *texts: torch.Tensor) -> None:
    """Refuse calibration tokens, and probes, that the model cannot run on."""
    config = runner.model.config
    for tokens in texts:
        if not isinstance(tokens, torch.Tensor):
            words = f"calibration tokens are a {type(tokens).__name__}; allowed are token ids, int64 [N, T]"
            raise DataError(words, "torch.tensor(rows), or blocks of text: layercut.token_blocks")
        if tokens.ndim != 2 or len(tokens) < 1 or tokens.shape[1] < 2 or tokens.dtype not in (torch.int64, torch.int32):
            raise DataError(
                f"calibration tokens are {tokens.dtype} {list(tokens.shape)}".replace("torch.", "")
                + "; allowed are token ids, int64 [N, T] with N >= 1 and T >= 2",
                "cut text into rows of equal length: layercut.token_blocks",
            )
        if (limit := positions(config)) and tokens.shape[1] > limit:
            words = f"rows of {tokens.shape[1]} tokens are longer than the model's {limit} positions"
            raise DataError(words, f"cut them into rows of {limit} at most")
        check_tokens(tokens, config, getattr(config, "name_or_path", "") or type(runner.model).__name__)
