"""Where the `plot()` of a result draws. Ground, for the results of search, healing and evaluation."""

from __future__ import annotations

from typing import Any


def axes_or_new(axes: Any = None, **labels: str) -> Any:
    """Axes to draw on; new ones are pyplot's, so that a notebook shows them."""
    if axes is None:
        import matplotlib.pyplot as plt

        axes = plt.subplots(layout="constrained")[1]
    axes.set(**labels)
    return axes
