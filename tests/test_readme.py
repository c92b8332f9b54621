"""Every command of README and quick start is run, on a tiny model with few tokens; those of the guides are parsed."""

import ast
import importlib.util
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

import folders
from layercut import cli

README = Path(__file__).parents[1] / "README.md"
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


def test_readme_commands_run_as_they_are_shown(tiny_model, texts, tmp_path, monkeypatch, capsys, quick_runs):
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


def test_commands_of_the_guides_are_understood(monkeypatch):
    monkeypatch.setattr(cli.app, "config", ())  # of the command that ran before
    guides = [*sorted((DOCS / "guides").glob("*.md")), DOCS / "guide-large.md"]
    shown = [shlex.split(line, comments=True)[1:] for line in commands(*guides)]
    assert {words[0] for words in shown} >= {"compress", "cut", "export", "plan", "quantize"}
    for words in shown:
        words = [word.replace("START:STOP", "13:19") for word in words]
        _, bound, _ = cli.app.parse_args(words, exit_on_error=False, print_error=False)
        config = bound.arguments.get("config")
        if hasattr(config, "check") and "--config" not in words:
            config.check()


@pytest.mark.parametrize(
    "page", ["README.md", "docs/results.md", "docs/guides/engines.md", "docs/what-survives-measured.md"]
)
def test_tables_are_those_of_the_results(page, monkeypatch):
    """Where this fails, a result was renewed and the page was not: python benchmarks/readme.py"""
    monkeypatch.syspath_prepend(README.parent / "benchmarks")
    text = (README.parent / page).read_text(encoding="utf-8")
    assert "<!-- " in text
    assert import_module("readme").filled(text) == text


# --- what the documents name ---

DOCUMENTS = ["README.md", *(f"docs/{name}.md" for name in ("method", "reference", "families", "guide-large"))]
"""docs/log.md is history: what it names may be gone."""
PLACES = ("src/layercut", "benchmarks", "tests", ".")
FILE_ENDINGS = {"json", "jsonl", "yaml", "yml", "md", "html", "svg", "txt", "gguf", "safetensors", "parquet", "py"}


def defined(file: Path) -> set[str]:
    """Names that a Python file defines, those inside classes as Class.name, without running it."""
    found: set[str] = set()

    def add(nodes: list[ast.stmt], prefix: str) -> None:
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                add(node.body, f"{node.name}.")
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [n for target in targets for n in ast.walk(target)]
                found.update(prefix + n.id for n in names if isinstance(n, ast.Name))

    add(ast.parse(file.read_text(encoding="utf-8")).body, "")
    return found


def python_file(name: str) -> Path | None:
    """The file that a document means by a path; None where there is none."""
    inside = (README.parent / place / name for place in PLACES)
    return next((file for file in inside if file.is_file()), None)


def module_file(dotted: str) -> Path | None:
    """Of a dotted name, such as layercut.pipeline.journey.compress, the file of our module that it begins with, if it
    does."""
    root = README.parent / "src" / "layercut"
    parts = dotted.removeprefix("layercut.").split(".")[:-1]
    for file in (root.joinpath(*parts).with_suffix(".py"), root.joinpath(*parts, "__init__.py")):
        if parts and file.is_file():
            return file
    return None


def wrong_names(text: str) -> list[str]:
    """Paths and functions that a document names in code spans and that are not there.

    A path is checked wherever it stands; module.name wherever the module is ours; a plain name in a row of a table
    behind the path of its file.
    """
    wrong = []
    for line in re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE).splitlines():
        file: Path | None = None
        # what stands in another cell, or behind a path of another row, is of no file
        for cell in re.split(r"(?<!\\)\|", line) if line.startswith("|") else [line]:
            file = None
            for span in re.findall(r"`([^`]+)`", cell):
                if re.fullmatch(r"[\w./-]+\.py", span):
                    file = python_file(span)
                    wrong += [] if file else [span]
                elif re.fullmatch(r"(benchmarks|tests|docs|src)/[\w./-]+", span):
                    wrong += [] if (README.parent / span).exists() else [span]
                elif re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", span):
                    ours = module_file(span) if span.rpartition(".")[2] not in FILE_ENDINGS else None
                    if ours and span.rpartition(".")[2] not in defined(ours):
                        wrong.append(span)
                    elif not ours and file and line.startswith("|") and span not in defined(file):
                        wrong.append(f"{file.name}: {span}")
        for address in re.findall(r"\]\(((?:docs|benchmarks|src|tests)/[^)#\s]+)", line):
            wrong += [] if (README.parent / address).exists() else [address]
    return wrong


@pytest.mark.parametrize("page", DOCUMENTS)
def test_documents_name_files_and_functions_that_exist(page):
    assert wrong_names((README.parent / page).read_text(encoding="utf-8")) == []


def test_names_that_do_not_exist_are_found():
    assert wrong_names("so `models.loading.read` leaves") == ["models.loading.read"]
    assert wrong_names("| a | `models/runner.py` `no_such_passes`, `DecoderRunner` |") == ["runner.py: no_such_passes"]
    assert wrong_names("| a | `search/gone.py` |") == ["search/gone.py"]
    assert wrong_names("see `docs/gone.md` and [here](docs/gone-too.md)") == ["docs/gone.md", "docs/gone-too.md"]
    fine = "`summary.json` `config.yaml`, `models.loading.share`, `layercut.pipeline.journey.compress`"
    assert wrong_names(f"{fine}\n| `layer_search/gate.py` `foretold_of_row` | `max_loss` |") == []


def test_the_readme_is_short_and_has_two_tables():
    text = README.read_text(encoding="utf-8")
    assert len(text.split()) <= 900
    assert len(re.findall(r"^\|-", text, flags=re.MULTILINE)) == 2
