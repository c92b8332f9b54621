"""Writes the pages of the documentation that are made from the code, into docs/generated/; `make docs` runs it.

    commands.md      every command and option, by cyclopts from the app that the command itself runs
    api.md           the public functions and classes, by mkdocstrings: those that `layercut._WHERE` lists
    contributing.md, changelog.md    the files of the repository's root, links adapted
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
GENERATED = ROOT / "docs" / "generated"


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


def from_root(name: str) -> str:
    """A page of the repository's root; its links lead out of docs/generated/."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return text.replace("](docs/", "](../")


def main() -> None:
    GENERATED.mkdir(exist_ok=True)
    pages = {"commands": commands(), "api": api()}
    pages |= {"contributing": from_root("CONTRIBUTING.md"), "changelog": from_root("CHANGELOG.md")}
    for name, text in pages.items():
        (GENERATED / f"{name}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
