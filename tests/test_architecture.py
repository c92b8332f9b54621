"""Architecture: few packages at the top, imports downward only, no cycles, unique names. Read from the source."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import layercut

ROOT = Path(layercut.__file__).parent
LEVELS = [
    {"errors"},
    {"registries", "segments", "files", "plotting"},
    {"config"},
    {"distributed"},
    {"progress"},
    {"models"},
    {"data"},
    # the rooms of the journey, which never import each other
    {"layer_search", "surgery", "healing", "quantization", "evaluation"},
    {"export"},
    {"report"},
    {"pipeline"},
    {"plan"},
    {"run"},
    {"cli"},
]
"""From the lowest level up: a package imports from the levels below it, and from itself."""
ALONE = {"export.reload_process", "export.llama_cpp_process"}
"""Run by themselves in a process that must not know layercut."""


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


def room(module: str) -> str:
    return module.split(".")[0]


def test_few_rooms_at_the_top_and_each_has_its_place():
    rooms = {room(module) for module in MODULES}
    assert rooms == set().union(*LEVELS), "say in LEVELS where in the journey a room stands"
    assert len(rooms) <= 21


def test_imports_go_downward():
    for module, file in MODULES.items():
        level = next(i for i, rooms in enumerate(LEVELS) if room(module) in rooms)
        allowed = set().union({room(module)}, *LEVELS[:level]) if module not in ALONE else set()
        wrong = sorted(name for name in imports(file) if room(name) not in allowed)
        assert not wrong, f"layercut.{module} may not import {', '.join(wrong)}; allowed: {', '.join(sorted(allowed))}"


def test_no_two_modules_or_public_classes_have_one_name():
    classes = [
        node.name
        for file in MODULES.values()
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    modules = [file.stem for file in MODULES.values() if file.stem not in ("__init__", "__main__")]
    for names in (classes, modules):
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
        assert not twice, f"two are called {', '.join(twice)}"
