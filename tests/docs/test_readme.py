"""Every command of README and quick start is run on a tiny model; those of the other pages are parsed."""

import importlib.util
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

import folders
from layercut import cli

README = Path(__file__).parents[2] / "README.md"
DOCS = README.parent / "docs"
FEW = {
    "compress": "--tokens 64 --window 16 --tune-tokens 64 --eval-tokens 64 --batch-tokens 32 --no-speed",
    "evaluate": "--eval-tokens 64 --window 16",
    "plan": "--window 16 --no-calibrate",
}


def commands(*pages: Path) -> list[str]:
    """The commands of layercut in the pages' sh blocks, each once."""
    texts = [page.read_text(encoding="utf-8") for page in pages]
    blocks = [block for text in texts for block in re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)]
    return list(dict.fromkeys(line for block in blocks for line in block.splitlines() if line.startswith("layercut ")))


def test_readme_commands_run_as_they_are_shown(tiny_model, texts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    calibration, evaluation = texts
    (tmp_path / "mytext.txt").write_text(Path(calibration).read_text())
    (tmp_path / "heldout.txt").write_text(Path(evaluation).read_text())
    shown = commands(README, DOCS / "index.md")
    assert len(shown) >= 5
    for line in shown:
        words = shlex.split(line)[1:]
        words = [str(tiny_model) if word == "HuggingFaceTB/SmolLM2-135M-Instruct" else word for word in words]
        few = FEW[words[0]].split()
        if "--tasks" in words:
            if importlib.util.find_spec("lm_eval") is None:
                continue
            words = [word.replace("arc_easy,piqa", "tiny_choices,tiny_sums") for word in words]
            few += ["--include-path", str(folders.write_tasks(tmp_path))]
        if "--data" not in words and words[0] == "compress":  # the defaults are Hub sets
            few += ["--data", "mytext.txt", "--eval-data", "heldout.txt"]
        assert cli.main([*words, *few]) == 0, (line, capsys.readouterr().err)
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()


def test_commands_of_the_pages_are_understood(monkeypatch):
    monkeypatch.setattr(cli.app, "config", ())  # of the command that ran before
    shown = [shlex.split(line, comments=True)[1:] for line in commands(*sorted(DOCS.glob("*.md")))]
    assert {words[0] for words in shown} >= {"compress", "cut", "export", "plan", "quantize"}
    for words in shown:
        words = [word.replace("START:STOP", "13:19") for word in words]
        _, bound, _ = cli.app.parse_args(words, exit_on_error=False, print_error=False)
        config = bound.arguments.get("config")
        if hasattr(config, "check") and "--config" not in words:
            config.check()


@pytest.mark.parametrize("page", ["README.md", "docs/results.md", "docs/engines.md"])
def test_tables_are_those_of_the_results(page, monkeypatch):
    """Where this fails, a result was renewed and the page was not: python research/tables.py"""
    monkeypatch.syspath_prepend(README.parent / "research")
    text = (README.parent / page).read_text(encoding="utf-8")
    assert "<!-- " in text
    assert import_module("tables").filled(text) == text


def test_the_pages_are_short():
    words = {page.name: len(page.read_text(encoding="utf-8").split()) for page in (README, *DOCS.glob("*.md"))}
    assert words.pop("README.md") <= 700
    assert len(words) <= 10
    assert sum(words.values()) <= 12_000
