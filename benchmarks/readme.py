"""Writes the README's table of figures from benchmarks/results/demo.json, which is a run's summary.

    layercut demo --out runs/demo
    python benchmarks/readme.py runs/demo        # takes the run over, then writes the table
    python benchmarks/readme.py                  # writes the table anew from the file that is there
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from layercut.figures import size
from layercut.findings import stages
from layercut.runs import write_json, write_text

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "demo.json"


def take_over(run: Path) -> None:
    """Copy a run's summary and where it ran, without paths of this machine."""
    summary = json.loads((run / "summary.json").read_text())
    environment = json.loads((run / "env.json").read_text())
    search = json.loads((run / "search.json").read_text())
    summary["model"] = Path(summary["model"]).name
    regret = (search["oracle"] or {}).get("regret")
    write_json(RESULT, {"summary": summary, "regret": regret, "environment": environment})


def table(result: dict) -> str:
    """The figures as Markdown."""
    summary, environment = result["summary"], result["environment"]
    perplexity, layers, size_of = summary["perplexity"], summary["layers"], summary["bytes"]
    segments = ", ".join(f"{start}:{stop}" for start, stop in summary["segments"])
    lines = [
        f"`make demo`, {environment['date'][:10]}, {environment['cores']} CPU cores ({environment['cpu']}): "
        f"{summary['model']}, {layers['before']} -> {layers['after']} layers (removed {segments}; the gate's choice "
        f"costs {result['regret']:.2f} times the oracle's), {size(size_of['before'])} -> {size(size_of['after'])} in "
        f"bfloat16. Perplexity on {perplexity['tokens']:,} tokens of {perplexity['dataset']}:",
        "",
        "| stage | perplexity | x dense | log gap closed |",
        "|---|---:|---:|---:|",
    ]
    for stage in stages(summary):
        if stage.perplexity is not None:
            closed = "" if stage.gap_closed is None else f"{100 * stage.gap_closed:.0f} %"
            lines.append(f"| {stage.name} | {stage.perplexity:.2f} | {stage.factor:.2f} | {closed} |")
    return "\n".join(lines)


def main() -> None:
    if len(sys.argv) > 1:
        take_over(Path(sys.argv[1]))
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    figures = table(json.loads(RESULT.read_text()))
    text = re.sub(
        r"(<!-- figures -->).*?(<!-- /figures -->)", rf"\1\n{figures}\n\2", text, flags=re.DOTALL
    )
    write_text(readme, text)


if __name__ == "__main__":
    main()
