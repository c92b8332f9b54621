"""Every example is run, on a tiny model with few tokens."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import yaml

import layercut
from layercut import cli

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def few(tiny_model: Path, texts: tuple[Path, Path], out: Path) -> dict[str, list[str]]:
    """Each script's arguments."""
    model, calibration, evaluation = str(tiny_model), str(texts[0]), str(texts[1])
    settings = {"tokens": 64, "window": 16, "tune_tokens": 64, "eval_tokens": 64, "batch_tokens": 32, "speed": False}
    settings |= {"data": calibration, "eval_data": evaluation}
    return {
        "search_and_cut.py": [model, calibration, evaluation, str(out / "small"), "64", "16"],
        "own_criterion.py": [model, calibration, "64", "16"],
        "journey.py": [model, str(out / "run"), *(f"{key}={value}" for key, value in settings.items())],
    }


def test_scripts_and_notebook_run(tiny_model, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(layercut.criteria, "registered", {})
    arguments = few(tiny_model, texts, tmp_path)
    assert {file.name for file in EXAMPLES.glob("*.py")} == set(arguments)
    for name, given in arguments.items():
        monkeypatch.setattr(sys, "argv", [name, *given])
        exec(compile((EXAMPLES / name).read_text(), name, "exec"), {"__name__": "__main__"})
    assert (tmp_path / "small" / "config.json").is_file()
    assert (tmp_path / "run" / "report.html").is_file()
    monkeypatch.chdir(tmp_path)
    for key, value in {"MODEL": tiny_model, "CALIBRATION": texts[0], "HELDOUT": texts[1]}.items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.setenv("TOKENS", "64")
    monkeypatch.setenv("WINDOW", "16")
    notebook: dict = {}
    for cell in json.loads((EXAMPLES / "heal.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), notebook)
    assert set(notebook["steps"]) == {"cut", "folded", "tuned"}


def test_the_snippet_of_the_readme_runs(tiny_model, texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    few = {'"HuggingFaceTB/SmolLM2-135M-Instruct"': repr(str(tiny_model)), '"c4"': repr(str(texts[0])),
           '"wikitext2"': repr(str(texts[1])), "tokens=81920": "tokens=128, window=16", "[64, 256]": "[4, 4]",
           "tokens=16384": "tokens=64, window=16",
           "probe_rows(tokenizer)": "probe_rows(tokenizer, rows=2, window=128)"}  # fmt: skip
    for shown, tiny in few.items():
        assert shown in snippet
        snippet = snippet.replace(shown, tiny)
    exec(snippet, {})
    assert (tmp_path / "out" / "config.json").is_file()


def test_configs_run(tiny_model, texts, tmp_path, capsys):
    """Settings by goal: those of `compress` as far as the search, or healing where the search needs it; `compare`."""
    common = ["--data", str(texts[0]), "--tokens", "64", "--window", "16"]
    files = sorted((EXAMPLES / "configs").glob("*.yaml"))
    assert len(files) >= 5
    for file in files:
        (shown,) = re.findall(r"layercut (\w+) MODEL --config (\S+)", file.read_text())
        assert shown[1] == str(file.relative_to(ROOT))
        command, words = shown[0], [*common, "--config", str(file), "--out", str(tmp_path / file.stem)]
        if command == "compare":
            words += ["--methods", "fisher,cosine", "--tune-tokens", "64"]
            words += ["--eval-data", str(texts[1]), "--eval-tokens", "64"]
        elif "target_size" in yaml.safe_load(file.read_text()):  # which is measured after healing
            command = "tune"
            words += ["--tune-tokens", "64", "--target-size", "250KB", "--batch-tokens", "32"]  # 8 bits of it
        else:
            command = "search"
        assert cli.main([command, str(tiny_model), *words]) == 0, (file.name, capsys.readouterr().err)
