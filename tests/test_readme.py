"""Every command the README shows is run: on a tiny model and small texts, with few tokens."""

import importlib.util
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

import folders
from layercut import cli

README = Path(__file__).parents[1] / "README.md"
FEW = {
    "compress": "--tokens 64 --window 16 --tune-tokens 64 --eval-tokens 64 --batch-tokens 32 --no-speed",
    "compare": "--tokens 64 --window 16 --eval-tokens 64",
    "search": "--tokens 64 --window 16",
    "evaluate": "--eval-tokens 64 --window 16",
    "cut": "",
    "plan": "--window 16 --no-calibrate",
    "quantize": "",
}


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("layercut ")]


def test_readme_commands_run_as_they_are_shown(tiny_model, texts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    calibration, evaluation = texts
    (tmp_path / "mytext.txt").write_text(Path(calibration).read_text())
    (tmp_path / "heldout.txt").write_text(Path(evaluation).read_text())
    shown = commands()
    assert len(shown) >= 6
    for line in shown:
        words = shlex.split(line)[1:]
        words = [str(tiny_model) if word == "HuggingFaceTB/SmolLM2-135M-Instruct" else word for word in words]
        words = [word.replace("13:19", "2:4").replace("16384", "64") for word in words]
        few = FEW[words[0]].split()
        if "--tasks" in words:
            if importlib.util.find_spec("lm_eval") is None:
                continue
            words = [word.replace("arc_easy,piqa", "tiny_choices,tiny_sums") for word in words]
            few += ["--include-path", str(folders.write_tasks(tmp_path))]
        if "--data" not in words and words[0] in ("compress", "compare", "search"):  # the defaults are Hub sets
            few += ["--data", "mytext.txt", *(["--eval-data", "heldout.txt"] if words[0] != "search" else [])]
        assert cli.main([*words, *few]) == 0, (line, capsys.readouterr().err)
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()
    assert (tmp_path / "smaller" / "config.json").is_file()


def test_tables_are_those_of_the_results(monkeypatch):
    """Where this fails, a result was renewed and the README was not: python benchmarks/readme.py"""
    monkeypatch.syspath_prepend(README.parent / "benchmarks")
    text = README.read_text(encoding="utf-8")
    assert import_module("readme").filled(text) == text


@pytest.mark.parametrize("page", ["method.md", "reference.md"])
def test_docs_name_files_that_exist(page):
    root = README.parent
    text = (root / "docs" / page).read_text(encoding="utf-8")
    for name in re.findall(
        r"`((?:search|heal|quantize|evaluate)/\w+\.py|(?:losses|measure|survival|pipeline)\.py)`", text
    ):
        assert (root / "src" / "layercut" / name).is_file(), name
