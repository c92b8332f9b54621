"""Imports go downward only: cli, demo, compare, plan -> pipeline -> stages -> ground. Read from the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import layercut

ROOT = Path(layercut.__file__).parent

# The rooms, from the ground up; a file belongs to the room of the first part of its name under layercut.
# data.py reads through sources.py, which reads pythontext.py: ground that stands on ground, and in this order.
GROUND = [
    "errors", "units", "files", "reading", "artefacts", "provenance", "configfile", "segments", "losses", "processes",
    "memory", "sharding", "progress", "config", "runs", "checkpoints",
    "gguf_files", "llama_rules", "gguf_config", "models", "stream", "opening", "lending",
    "pythontext", "records", "textfiles", "sources", "chats", "selftext", "overlap", "data", "sweep",
]  # fmt: skip
# what several files do together is one room
ROOMS = {
    "findings": "report", "figures": "report", "charts": "report", "survival": "report", "remarks": "report",
    "progressive": "report", "rules": "report",
    "gguf_export": "export", "gguf_check": "export", "reload_streamed": "export",
}  # fmt: skip
STAGES = ["search", "cut", "heal", "quantize", "evaluate", "measure", "export", "report"]
TOP = ["workbench", "stages", "rounds", "pipeline", "alone", "to_gguf", "compare", "plan", "demo", "cli"]
ALONE = ["reload_check", "llama_check", "chat_alone"]
"""Run by themselves in a process that must not know layercut."""


def room(module: str) -> str:
    first = module.split(".")[0]
    return ROOMS.get(first, first)


def imports(file: Path) -> set[str]:
    """What a file imports of layercut, at its top or inside a function, without the leading name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relative to itself"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= set(names) if node.module == "layercut" else {node.module or ""}
    inside = {name.removeprefix("layercut.") for name in found if name.startswith("layercut.")}
    return inside - {"__version__"}


MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for file in ROOT.rglob("*.py")
    if file != ROOT / "__init__.py"
}


def test_every_file_has_its_place():
    unknown = {room(module) for module in MODULES} - {*GROUND, *STAGES, *TOP, *ALONE}
    assert not unknown, f"{sorted(unknown)}: say in tests/test_architecture.py where in the journey this stands"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_downward(module):
    place = room(module)
    allowed = {
        **{name: {*GROUND[:i]} for i, name in enumerate(GROUND)},
        **{name: {*GROUND, name} for name in STAGES},
        "workbench": {*GROUND, *STAGES},
        "stages": {*GROUND, *STAGES, "workbench", "stages"},
        "rounds": {*GROUND, *STAGES, "workbench", "stages"},
        "pipeline": {*GROUND, *STAGES, "workbench", "stages", "rounds"},
        "alone": {*GROUND, *STAGES, "stages", "pipeline"},
        "to_gguf": {*GROUND, *STAGES},
        "compare": {*GROUND, *STAGES, "workbench", "stages", "pipeline"},
        "plan": {*GROUND, *STAGES, "stages", "pipeline", "plan"},
        "demo": {*GROUND, "pipeline"},
        # the command prints the report's closing table; all else goes through the pipeline
        "cli": {*GROUND, "pipeline", "alone", "to_gguf", "compare", "plan", "demo", "report"},
        "reload_check": set(),
        "llama_check": set(),
        "chat_alone": set(),
    }[place]
    wrong = sorted(name for name in imports(MODULES[module]) if room(name) not in allowed)
    assert not wrong, f"layercut.{module} may not import {', '.join(wrong)}; allowed are {', '.join(sorted(allowed))}"
