"""Segments of the layer stack: half-open and 0-based, everywhere.

A segment [start, stop) names the decoder layers that are removed. The layers beside it, start - 1 and
stop, are its *endpoints*: the only ones that healing trains.
"""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import msgspec

from layercut.errors import ConfigError


class Segment(msgspec.Struct, frozen=True, order=True, array_like=True):
    """Decoder layers start, start + 1, …, stop - 1, to be removed; [start, stop] in JSON."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ConfigError(
                f"segment {self.start}:{self.stop} is empty or negative; allowed is START:STOP with 0 <= START < STOP",
                "layers are counted from 0 and STOP is not removed: --segment 13:19 removes six layers",
            )

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}"

    @classmethod
    def parse(cls, text: str) -> Segment:
        """Read "13:19".

        Raises:
            ConfigError: it is not of this form.
        """
        start, colon, stop = text.partition(":")
        try:
            if not colon:
                raise ValueError
            bounds = int(start), int(stop)
        except ValueError:
            raise ConfigError(
                f"segment {text!r} is not of the form START:STOP with two whole numbers",
                "for layers 13 to 18: --segment 13:19",
            ) from None
        return cls(*bounds)


def as_segments(segments: Any) -> list[Segment]:
    """Segments as a person may give them: each a Segment, a pair (13, 19) or "13:19"; one alone or several."""
    is_pair = isinstance(segments, tuple) and len(segments) == 2 and all(isinstance(bound, int) for bound in segments)
    alone = is_pair or isinstance(segments, str | Segment) or not isinstance(segments, Iterable)
    return [_as_segment(one) for one in ([segments] if alone else segments)]


def _as_segment(given: Any) -> Segment:
    if isinstance(given, Segment):
        return given
    if isinstance(given, str):
        return Segment.parse(given)
    try:
        start, stop = given
        return Segment(operator.index(start), operator.index(stop))
    except (TypeError, ValueError):
        shown, holds = reprlib.repr(given), hasattr(given, "segments")
        raise ConfigError(
            f"{shown} is no segment; allowed are Segment(13, 19), (13, 19) and '13:19'",
            "give its segments: found.segments" if holds else "several are given as a list: [(3, 5), (13, 19)]",
        ) from None


def checked_segments(segments: Iterable[Segment], layers: int) -> list[Segment]:
    """Sort segments, join those that touch, and check them against a stack: inside it, disjoint, and not all of it."""
    ordered = sorted(segments)
    for segment in ordered:
        if segment.stop > layers:
            raise ConfigError(
                f"segment {segment} reaches beyond the model's {layers} layers",
                f"allowed are segments inside 0:{layers}",
            )
    for left, right in pairwise(ordered):
        if right.start < left.stop:
            raise ConfigError(
                f"segments {left} and {right} overlap",
                f"give one segment instead: --segment {left.start}:{max(left.stop, right.stop)}",
            )
    if sum(map(len, ordered)) >= layers:
        raise ConfigError(
            f"the segments {', '.join(map(str, ordered))} would remove all {layers} layers", "keep at least one layer"
        )
    return [*joined_segments(layers_of(ordered))]


def kept_layers(segments: Sequence[Segment], layers: int) -> list[int]:
    """Original indices of the layers that stay, in order: the `original_layer_index` of the cut model."""
    ordered = checked_segments(segments, layers)
    removed = {*layers_of(ordered)}
    return [i for i in range(layers) if i not in removed]


def layers_of(segments: Iterable[Segment]) -> list[int]:
    """The layers that segments remove, in the order of these: 7:8, 2:4 -> 7, 2, 3."""
    return [i for segment in segments for i in range(segment.start, segment.stop)]


def joined_segments(layers: Iterable[int]) -> tuple[Segment, ...]:
    """Layers to remove, in any order, as the fewest segments: {7, 2, 3} -> 2:4, 7:8."""
    segments: list[Segment] = []
    for i in sorted(set(layers)):
        start = segments.pop().start if segments and segments[-1].stop == i else i
        segments.append(Segment(start, i + 1))
    return tuple(segments)


def layers_to_remove(ratio: float, layers: int) -> int:
    """n = round(ratio * layers), at least one layer and never all of them."""
    if not 0 < ratio < 1:
        raise ConfigError(f"--ratio {ratio:g} is not between 0 and 1", "a fifth of the layers: --ratio 0.2")
    n = round(ratio * layers)
    if layers < 2:
        raise ConfigError(
            "the model has one layer, and no cut leaves any", "leave out --ratio, and quantize it: --bits 8"
        )
    if n < 1 or n >= layers:
        raise ConfigError(
            f"--ratio {ratio:g} of {layers} layers is {n} layers; allowed is 1 to {layers - 1}",
            f"smallest: --ratio {1 / layers:.3f}, largest: --ratio {(layers - 1) / layers:.3f}",
        )
    return n
