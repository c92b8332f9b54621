"""What every benchmark shares: the model, the text, and one JSON file with everything needed to run it again."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from layercut.cli.demo import fetch_model
from layercut.data.blocks import Blocks, load_blocks
from layercut.data.sources import CHATS, SELF, has
from layercut.files import write_atomically, write_json
from layercut.models import checkpoints, loading
from layercut.pipeline.environment import environment

RESULTS = Path(__file__).with_name("results")


def arguments(description: str, **defaults: Any) -> argparse.Namespace:
    """--model (the demo's SmolLM2-135M-Instruct where not given), --out, and one option per default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default=None, help="Hub id, folder or .gguf; the demo's SmolLM2 where not given")
    parser.add_argument("--out", type=Path, default=RESULTS / (Path(sys.argv[0]).stem + ".json"))
    for name, default in defaults.items():
        kind = {"nargs": "+", "type": type(default[0])} if isinstance(default, list) else {"type": type(default)}
        parser.add_argument("--" + name.replace("_", "-"), default=default, **kind)
    return parser.parse_args()


def open_model(name: str | None) -> loading.LanguageModel:
    return loading.load(checkpoints.resolve(name or str(fetch_model())))


def blocks(model: loading.LanguageModel, source: str, tokens: int, window: int, seed: int, **more: Any) -> Blocks:
    writer = model.model if has(source, SELF, CHATS) else None
    return load_blocks(source, model.tokenizer, tokens=tokens, window=window, seed=seed, model=writer, **more)


def compact(content: Any, level: int = 0) -> str:
    """JSON with one record a line: what is nested deeper than two levels stays on its line."""
    if level == 2 or not isinstance(content, dict | list) or not content:
        return json.dumps(content, ensure_ascii=False)
    pad, keys = "\n" + " " * (level + 1), isinstance(content, dict)
    parts = [
        f"{json.dumps(key)}: {compact(content[key], level + 1)}" if keys else compact(key, level + 1) for key in content
    ]
    opening, closing = "{}" if keys else "[]"
    return opening + pad + f",{pad}".join(parts) + "\n" + " " * level + closing + ("" if level else "\n")


class RowsDone:
    """Rows of a benchmark that goes on where it was stopped: of its result file, or of the partial one beside it."""

    def __init__(self, out: Path, facts: dict[str, Any]) -> None:
        """Take what is there; rows made with other facts are refused."""
        self.partial, self.facts = out.with_name(f".{out.stem}.partial.json"), facts
        there = next((file for file in (self.partial, out) if file.is_file()), None)
        old: dict[str, Any] = json.loads(there.read_text()) if there else {"rows": []}
        if old["rows"] and any(old.get(name) != value for name, value in facts.items()):
            raise SystemExit(f"error: {out} was made with other settings\nhint: give another --out, or remove it")
        self.rows: list[dict[str, Any]] = old["rows"]

    def __contains__(self, asked: dict[str, Any]) -> bool:
        return any(asked.items() <= row.items() for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row on disk."""
        self.rows.append(row)
        write_json(self.partial, self.facts | {"rows": self.rows})


def named(content: Any) -> Any:
    """Results name files, not where this machine keeps them: "/data/a.txt+/data/b.txt" -> "a.txt+b.txt"."""
    if isinstance(content, dict):
        return {key: named(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [named(value) for value in content]
    if isinstance(content, str) and content.startswith("/"):
        return "+".join(Path(part).name for part in content.split("+"))
    return content


def without_folder(argument: str) -> str:
    """NAME=/data/a.txt -> NAME=a.txt, in each of its words; anything else as it is."""
    parts = (word.partition("=") for word in argument.split(" "))
    return " ".join(f"{name}={named(source)}" if equals else name for name, equals, source in parts)


def finish(out: Path, model: loading.LanguageModel, claim: str, rows: list[dict[str, Any]], **facts: Any) -> None:
    """Write the result file and print it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    environ = environment()
    given = (argument for argument in sys.argv[1:] if not argument.startswith("/"))
    environ["command"] = [Path(sys.argv[0]).name, *map(without_folder, given)]
    content = {
        "claim": claim,
        "model": Path(model.checkpoint.name).name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        **facts,
        "rows": rows,
        "environment": environ,
    }
    with write_atomically(out) as partial:
        partial.write_text(compact(named(content)), encoding="utf-8")
    print(json.dumps(rows, indent=1))
