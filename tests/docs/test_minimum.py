"""pyproject.toml's lower bounds are the versions that `make test-minimum` tests with."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
TOOLS = {"pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "types-pyyaml", "build", "setuptools"}
TOOLS |= {"zensical", "mkdocstrings-python", "layercut"}
"""What tests and benchmarks are run with, and not what is tested."""


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints" / "minimum.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_lower_bounds_are_those_that_are_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    found: dict[str, set[str]] = {}
    for wanted in map(Requirement, lines):
        lowest = [s.version for s in wanted.specifier if s.operator == ">="]
        found.setdefault(wanted.name.lower(), set()).update(lowest)
    versions = pinned()
    assert set(versions) == set(found) - TOOLS
    for name, version in versions.items():
        assert len(found[name]) == 1, f"{name} has several lower bounds"
        (lowest,) = found[name]
        assert release(lowest) == release(version), f"{name}>={lowest} is tested with {version}"


def release(version: str) -> list[int]:
    """1.10 and 1.10.0 are the same."""
    return [int(part) for part in [*version.split("."), "0", "0"][:3]]
