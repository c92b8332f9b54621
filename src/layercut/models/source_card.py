"""What a model says of itself: its id on the Hub, its licence and languages. Ground for the card of what is made of it.

Read from the README.md of a folder, of the Hub's copy on this machine, or from the metadata of a GGUF file. What is not
said there is None, and nothing is guessed; a path of this machine is never part of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from layercut.errors import ModelError
from layercut.files import open_regular
from layercut.models.gguf_header import read_header

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
CACHED = re.compile(r"models--([^/]+?)--([^/]+)")
"""The folder of a model in huggingface_hub's cache."""
GGUF_ADDRESSES = ("general.repo_url", "general.source.repo_url", "general.source.huggingface.repository")
QUANTIZED_NAME = re.compile(r"[.-](I?Q\d\w*|TQ\d\w*|B?F16|F32|MXFP4\w*)$", re.IGNORECASE)
"""How the stem of a GGUF file's name ends that says its number format."""
LONGEST_CARD = 4 * 2**20
LONGEST_VALUE = 200


@dataclass(frozen=True, kw_only=True)
class SourceCard:
    """Who a model is, as far as that is known."""

    name: str
    """Of the model, of its folder or of its file; never a path."""
    hub_id: str | None = None
    """owner/name on the Hub."""
    license: str | None = None
    """As the Hub names it, such as apache-2.0; with "other", `license_name` and `license_link` say which."""
    license_name: str | None = None
    license_link: str | None = None
    languages: tuple[str, ...] = ()
    """Codes such as en."""
    is_first: bool = False
    """Whether it is the model that a folder was once made from by layercut, and not that folder."""

    @property
    def base_model(self) -> str | None:
        """What the Hub's `base_model` takes: the id, else the name where it has the form of one."""
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(self.hub_id or self.name)
        except HFValidationError:
            return None
        return self.hub_id or self.name


def source_card(model: str) -> SourceCard:
    """What the files of a model on this machine, or its page on the Hub, say of it."""
    path = Path(model).expanduser()
    cached = CACHED.search(str(path))
    hub_id = f"{cached[1]}/{cached[2]}" if cached else None
    if path.is_file():
        return _of_gguf(path, hub_id)
    if path.is_dir():
        front = _front_matter(path / "README.md")
        bases = _texts(front.get("base_model"))
        if hub_id is None and bases and "layercut" in _texts(front.get("tags")):  # what was made of a model is that one
            known = next((base for base in bases if HUB_ID.fullmatch(base)), None)
            return replace(_described(bases[0].rpartition("/")[2], known, front), is_first=True)
        return _described(hub_id.rpartition("/")[2] if hub_id else path.resolve().name, hub_id, front)
    if HUB_ID.fullmatch(model):
        return _described(model.rpartition("/")[2], model, _front_matter(_hub_readme(model)))
    return _described(_stem(path) or "model", hub_id, {})  # it is not there any more


def _of_gguf(path: Path, hub_id: str | None) -> SourceCard:
    """By its metadata, and by its name: what converters write as general.name is often the folder of a training run."""
    try:
        values = read_header(path).values
    except ModelError:
        values = {}
    for address in (str(values.get(key, "")) for key in GGUF_ADDRESSES):
        found = HUB_ID.fullmatch(address.removeprefix("https://huggingface.co/").rstrip("/"))
        hub_id = hub_id or (found[0] if found else None)
    front = {key: values.get(f"general.{key.replace('_', '.')}") for key in ("license", "license_name", "license_link")}
    return _described(_stem(path), hub_id, front | {"language": values.get("general.languages")})


def _stem(path: Path) -> str:
    """The name of a folder; of a GGUF file without its number format."""
    return QUANTIZED_NAME.sub("", path.stem) if path.suffix == ".gguf" else path.name


def _described(name: str, hub_id: str | None, front: dict[str, Any]) -> SourceCard:
    """With what a card's front matter says, as far as it is text of one line and of a bearable length."""
    keys = ("license", "license_name", "license_link")
    found: dict[str, Any] = {key: next(iter(_texts(front.get(key))), None) for key in keys}
    shown = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    return SourceCard(name=shown, hub_id=hub_id, languages=tuple(_texts(front.get("language"))), **found)


def _hub_readme(hub_id: str) -> Path | None:
    """The model's README.md, which was fetched with its weights; None where it has none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    try:
        return Path(hf_hub_download(hub_id, "README.md", local_files_only=True))
    except (EntryNotFoundError, HFValidationError, OSError):
        return None


def _front_matter(path: Path | None) -> dict[str, Any]:
    """The YAML between the two --- at the top of a README.md; empty where there is none that can be read."""
    try:
        if path is None:
            return {}
        with open_regular(path) as file:
            text = file.read(LONGEST_CARD).decode("utf-8", errors="replace")
        found = re.match(r"---[ \t]*\r?\n(.*?\n)---[ \t]*\r?\n", text, re.DOTALL)
        values = yaml.safe_load(found[1]) if found else {}
    except (OSError, ModelError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    values = ["no" if each is False else each for each in values[:100]]  # YAML reads the code of Norwegian as false
    return [each for each in values if isinstance(each, str) and 0 < len(each) <= LONGEST_VALUE and each.isprintable()]
