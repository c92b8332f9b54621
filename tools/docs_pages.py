"""Writes the pages of the documentation that are made from the code, into docs/generated/; `make docs` runs it.

    commands.md      every command and option, by cyclopts from the app that the command itself runs
    api.md           the public functions and classes, by mkdocstrings: those that `layercut._WHERE` lists
    modules.md       the modules of MODULES, by mkdocstrings
    contributing.md, changelog.md    the files of the repository's root, links adapted

Nothing else names modules for the documentation: after a module moves, MODULES is the one place to adapt.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
GENERATED = ROOT / "docs" / "generated"
MODULES = {
    "Settings and errors": ["config", "errors", "segments", "registries", "progress"],
    "The journey": ["pipeline.journey", "pipeline.resolve_options", "pipeline.iterative", "pipeline.run_store"],
    "Models": ["models.loading", "models.runner", "models.losses", "models.objectives"],
    "Search": [
        "layer_search.criteria", "layer_search.clp", "layer_search.gate", "layer_search.prices", "layer_search.sweep",
        "layer_search.exhaustive", "layer_search.greedy", "layer_search.statistics", "layer_search.budgets",
    ],
    "Surgery": ["surgery.in_memory", "surgery.checkpoint_cut", "surgery.gguf_cut", "surgery.config_cut"],
    "Healing": ["healing.least_squares", "healing.endpoint_tuning", "healing.tuning_pass", "healing.tuning_state"],
    "Quantization": ["quantization.gptq", "quantization.grid", "quantization.packing"],
    "Evaluation": ["evaluation.likelihood", "evaluation.generation", "evaluation.retention", "evaluation.passkey"],
    "Export": ["export.checkpoint", "export.gguf_export", "export.gguf_check"],
}  # fmt: skip
"""Modules of layercut in the reference, under their headings."""


def commands() -> str:
    """All commands with their options and defaults."""
    from layercut import cli

    text = cli.app.generate_docs(output_format="markdown")
    # help that goes over several lines is indented so far that Markdown would read a block of code
    return re.sub(r"\n {4,}(?=\S)", " ", text)


def api() -> str:
    """The public functions and classes, each documented where it is defined."""
    import layercut

    lines = ["# Python API", "", "`import layercut as lc`; every name below is an attribute of `lc`.", ""]
    for name, module in layercut._WHERE.items():
        lines += [f"## {name}", "", f"::: layercut.{module}.{name}", ""]
    return "\n".join(lines)


def modules() -> str:
    """The modules behind the API, for who reads or extends the code."""
    lines = ["# Modules", "", "What is behind the [Python API](api.md). These names may change between versions.", ""]
    for heading, names in MODULES.items():
        lines += [f"## {heading}", ""]
        for name in names:
            lines += [f"### layercut.{name}", "", f"::: layercut.{name}", ""]
    return "\n".join(lines)


def missing() -> list[str]:
    """Names of MODULES that are no modules."""
    return [name for names in MODULES.values() for name in names if not is_module(f"layercut.{name}")]


def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a package above it is not there
        return False


def from_root(name: str) -> str:
    """A page of the repository's root; its links lead out of docs/generated/."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return text.replace("](docs/", "](../")


def main() -> None:
    if absent := missing():
        sys.exit(f"{Path(__file__).name}: MODULES names what is no module: {', '.join(absent)}")
    GENERATED.mkdir(exist_ok=True)
    pages = {"commands": commands(), "api": api(), "modules": modules()}
    pages |= {"contributing": from_root("CONTRIBUTING.md"), "changelog": from_root("CHANGELOG.md")}
    for name, text in pages.items():
        (GENERATED / f"{name}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
