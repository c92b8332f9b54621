"""How many calls lie between the journey and its formulas: who reads `journey.compress` is soon at the mathematics."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from layercut.cli.command_line import main
from layercut.healing.least_squares import Normal
from layercut.layer_search import gate
from layercut.models.objectives import KL

MOST = {"foretold_of_row": 5, "solve": 5, "loss_and_gradient": 7}
"""Calls from `journey.compress`, which the command calls, to the formula, the formula's own included. A loss has one
more: what is compiled as one."""


class Seen(Exception):
    """The last formula was reached; nothing more of the journey is needed."""


def calls() -> list[str]:
    """Functions of layercut that are being called now, from the outermost; the caller's caller is the last."""
    found: list[str] = []
    frame = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("layercut."):
            found.append(f"{module.removeprefix('layercut.')}.{frame.f_code.co_name}")
        frame = frame.f_back  # type: ignore[assignment]
    return found[::-1]


def test_from_the_command_to_the_formulas_are_few_calls(tiny_model, texts, tmp_path, monkeypatch):
    paths: dict[str, list[str]] = {}

    def watch(owner: Any, name: str, last: bool = False) -> None:
        real = getattr(owner, name)

        def formula(*args: Any, **kwargs: Any) -> Any:
            paths.setdefault(name, [*calls(), name])
            if last:
                raise Seen
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, formula)

    watch(gate, "foretold_of_row")
    watch(Normal, "solve")
    watch(KL, "loss_and_gradient", last=True)
    arguments = ["tune", str(tiny_model), f"--data={texts[0]}", f"--out={tmp_path / 'run'}", "--device=cpu"]
    with pytest.raises(Seen):
        main([*arguments, "--ratio=0.25", "--tokens=64", "--window=16", "--tune-tokens=64", "--batch-tokens=32"])
    for name, most in MOST.items():
        path = paths[name]
        count = len(path) - 1 - path.index("pipeline.journey.compress")
        assert count <= most, f"{count} calls, at most {most}: {' -> '.join(path)}"
