"""The documentation: the site builds without a broken link, files of the root name what exists, the package builds."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import layercut

ROOT = Path(__file__).parents[2]


def run(*command: object, cwd: Path) -> str:
    """The output of a command that must succeed."""
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def pages(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    return import_module("docs_pages")


def test_site_builds_strictly(tmp_path):
    pytest.importorskip("zensical")
    pytest.importorskip("mkdocstrings")
    for name in ("src", "docs", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("generated", "__pycache__"))
    for name in ("mkdocs.yml", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    run(sys.executable, "tools/docs_pages.py", cwd=tmp_path)
    run(sys.executable, "-m", "zensical", "build", "--strict", cwd=tmp_path)
    assert (tmp_path / "build" / "site" / "generated" / "api" / "index.html").is_file()


def test_command_reference_has_every_option(pages):
    text = pages.commands()
    for name in ("compress", "search", "cut", "evaluate", "plan", "export"):
        assert f"## layercut {name}" in text
    assert "--tune-tokens" in text
    assert not re.search(r"^ {4,}\S", text, flags=re.MULTILINE)


def test_contributing_names_files_that_exist():
    named = re.findall(r"`((?:src|tests|research|tools|docs)/[\w/.]+)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(named) >= 8
    assert [name for name in named if "NAME" not in name and not (ROOT / name).exists()] == []


def test_links_lead_somewhere_and_the_nav_has_every_page():
    pages = [page for folder in (".", "docs", "research") for page in (ROOT / folder).glob("*.md")]
    for page in pages:
        links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
        assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == [], page
    nav = str(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    named = {name for name in re.findall(r"[\w/-]+\.md", nav) if not name.startswith("generated/")}
    assert named == {page.name for page in (ROOT / "docs").glob("*.md")}


def test_citation_has_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == layercut.__version__
    assert {"cff-version", "message", "title", "authors"} <= set(citation)


def test_hooks_are_local():
    for repository in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]:
        assert repository["repo"] == "local"
        assert all(hook["language"] == "system" for hook in repository["hooks"])


def test_built_wheel_runs_in_a_clean_environment(tmp_path, monkeypatch):
    """No index is asked: setuptools and build are here, and the wheel finds its dependencies where the tests do."""
    pytest.importorskip("build")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    source = tmp_path / "source"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, cwd=source)
    (wheel,) = tmp_path.glob("layercut-*.whl")
    assert list(tmp_path.glob("layercut-*.tar.gz"))
    packed = zipfile.ZipFile(wheel).namelist()
    assert "layercut/py.typed" in packed
    assert any(name.endswith("/report.html") for name in packed)
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    python = venv / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    libraries = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    (Path(libraries) / "of_the_tests.pth").write_text(sysconfig.get_path("purelib"))
    where = run(python, "-c", "import layercut; print(layercut.__file__)", cwd=tmp_path)
    assert where.startswith(str(venv))
    assert "compress" in run(venv / "bin" / "layercut", "--help", cwd=tmp_path)
    plain = run(venv / "bin" / "layercut", "--version", cwd=tmp_path).strip()
    assert plain == layercut.__version__
