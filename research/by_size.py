"""Draws what is kept, and what 80 % smaller costs, over the size of the model, with the error of each and of the line.

python research/by_size.py      # from the files of research/results that SIZES names; writes docs/by-size.svg

The line is fitted by weighted least squares to the logarithm of the parameters. Its band is two standard errors of the
line, as the points' own errors give them; what other models, texts or tokens would do is not in it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from tables import ROOT, read

SIZES = {
    "SmolLM2-135M": (134.5e6, "survives-0.2-chats"),
    "Qwen2.5-Coder-0.5B": (494e6, "survives-0.2-qwen-default"),
    "Qwen2.5-Coder-1.5B": (1543.7e6, "survives-0.2-qwen15"),
}
"""Parameters of each model, and the comparison whose first method is the default at a fifth of the layers."""
PAPER = (70e9, 95.34)
"""CLP's own, other tasks of LLaMA-3-70B; no error is given (2510.23652)."""
ASKED = 8e9


class Line(NamedTuple):
    """y = height + slope * log10(parameters / centre), and the errors of both, which are independent there."""

    centre: float
    height: float
    slope: float
    height_error: float
    slope_error: float

    def at(self, parameters: float) -> tuple[float, float]:
        """Value and standard error."""
        x = math.log10(parameters) - self.centre
        return self.height + self.slope * x, math.hypot(self.height_error, self.slope_error * x)


def fitted(points: list[tuple[float, float, float]]) -> Line:
    """The line through (parameters, value, error)."""
    weights = [error**-2 for *_, error in points]
    centre = sum(w * math.log10(n) for w, (n, *_) in zip(weights, points, strict=True)) / sum(weights)
    height = sum(w * y for w, (_, y, _) in zip(weights, points, strict=True)) / sum(weights)
    x = [math.log10(n) - centre for n, *_ in points]
    spread = sum(w * each**2 for w, each in zip(weights, x, strict=True))
    slope = sum(w * each * y for w, each, (_, y, _) in zip(weights, x, points, strict=True)) / spread
    return Line(centre, height, slope, sum(weights) ** -0.5, spread**-0.5)


def kept_by_size() -> dict[str, tuple[float, float, float]]:
    """Of each model its parameters, the share of seven tasks that is kept, in per cent, and its error."""
    found = {}
    for name, (parameters, file) in SIZES.items():
        kept = read(file)["comparison"]["methods"][0]["judged"]["tuned"]["retained"]
        found[name] = (parameters, 100 * kept["mean"], 100 * kept["error"])
    return found


def main() -> None:
    import matplotlib
    from matplotlib.figure import Figure

    points = kept_by_size()
    line = fitted([*points.values()])
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "layercut", "text.parse_math": False}):
        canvas = Figure(figsize=(7, 3.6), layout="constrained")
        axes = canvas.subplots()
        over = [10 ** (8 + 3 * i / 60) for i in range(61)]
        values = [line.at(n) for n in over]
        low, high = ([y + side * e for y, e in values] for side in (-2, 2))
        axes.fill_between(over, low, high, color="#2b7fd0", alpha=0.15)
        axes.plot(over, [y for y, _ in values], color="#2b7fd0", lw=1)
        for name, (n, y, error) in points.items():
            axes.errorbar(n, y, yerr=2 * error, fmt="o", color="#2b7fd0", capsize=3)
            axes.annotate(name, (n, y), xytext=(6, 6), textcoords="offset points", fontsize=8)
        axes.plot(*PAPER, "o", mfc="none", color="#e07b28")
        beside: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8}
        axes.annotate("CLP, 70B, other tasks", PAPER, xytext=(-4, 6), ha="right", **beside)
        axes.axvline(ASKED, color="#c8c8d0", lw=0.8, ls=(0, (4, 3)), zorder=0)
        axes.annotate(" 8B", (ASKED, axes.get_ylim()[0]), fontsize=8, va="bottom")
        axes.set_xscale("log")
        axes.set_xlabel("parameters")
        axes.set_ylabel("seven tasks, % of the dense score")
        axes.spines[["top", "right"]].set_visible(False)
        file = Path(ROOT / "docs" / "by-size.svg")
        canvas.savefig(file, format="svg", metadata={"Date": None})
    value, error = line.at(ASKED)
    print(
        f"at {ASKED:g} parameters {value:.1f} ± {error:.1f} %; slope {line.slope:.1f} ± {line.slope_error:.1f} a decade"
    )


if __name__ == "__main__":
    main()
