"""From a model's name to files on this machine, checked: a Hub id, a local folder or a .gguf file.

First stage of the journey: everything after this module deals with files. Pickled weights are refused unless asked for,
and shard names may not leave the folder.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layercut.errors import ModelError, first_line

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
WEIGHT_PATTERNS = ["*.safetensors", "*.safetensors.index.json"]
PICKLE_PATTERNS = ["*.bin", "*.bin.index.json"]
OTHER_PATTERNS = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]


@dataclass(frozen=True)
class Checkpoint:
    """A model on this machine's disk: a folder, or a folder and the .gguf file in it."""

    name: str
    folder: Path
    gguf: str | None = None

    @property
    def file(self) -> Path:
        """The path a user would recognise."""
        return self.folder / self.gguf if self.gguf else self.folder

    def fingerprint(self) -> str:
        """Hash of the files' names, sizes and modification times: changes with the model, costs nothing."""
        files = [self.file] if self.gguf else sorted(p for p in self.folder.iterdir() if p.is_file())
        facts = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def resolve(name: str, *, allow_pickle: bool = False, weights: bool = True) -> Checkpoint:
    """Turn MODEL (Hub id, folder or .gguf file) into files on this machine; downloads where needed.

    weights False: of a Hub id config.json alone is fetched, and a folder need hold no more than that.

    Raises ModelError: no such model, gated, no network, not a model folder, weights that are unsafe to read.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf" or path.is_file():
        return _resolve_file(name, path)
    if path.is_dir() and name.strip():
        if weights:
            check_folder(path, allow_pickle=allow_pickle)
        else:
            check_config(path)
        return Checkpoint(name, path.resolve())
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or not name.strip():
        raise ModelError(
            f"no model at {name!r}: neither a folder nor a .gguf file, and not a Hub id (owner/name)",
            "give a folder that holds config.json and *.safetensors, a .gguf file, or a Hub id",
        )
    if not weights:
        folder = _download(name, allow_pickle=False, weights=False)
        check_config(folder)
        return Checkpoint(name, folder)
    folder = _download(name, allow_pickle=allow_pickle)
    check_folder(folder, allow_pickle=allow_pickle)
    return Checkpoint(name, folder)


def _resolve_file(name: str, path: Path) -> Checkpoint:
    if not path.is_file():
        raise ModelError(f"no file {name!r}", "check the path of the .gguf file")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(
            f"{name!r} is not a GGUF file (it starts with {magic!r})",
            "give a .gguf file, a folder with config.json and *.safetensors, or a Hub id",
        )
    # the Hub's cache links to a file without this name, whose folder holds no other: the link is what is read
    return Checkpoint(name, path.parent.resolve(), path.name)


def _download(name: str, *, allow_pickle: bool, weights: bool = True) -> Path:
    """Fetch a model's files from the Hub, or take an earlier fetch where the Hub cannot be reached."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    patterns = WEIGHT_PATTERNS + OTHER_PATTERNS + (PICKLE_PATTERNS if allow_pickle else [])
    try:
        answers = _hub_answers(name)
        if not weights:
            return Path(hf_hub_download(name, "config.json", local_files_only=not answers)).parent
        if not answers:
            return Path(snapshot_download(name, local_files_only=True))
        hf_hub_download(name, "config.json")
        left_out = ["original/*", "consolidated*"]
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=left_out))
    except GatedRepoError:
        raise ModelError(
            f"{name!r} is gated: its owner must grant you access first",
            f"accept the terms at https://huggingface.co/{name}, then run `hf auth login`",
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"no model {name!r} on the Hub, and no such folder here",
            "check the spelling; for a private model run `hf auth login` first",
        ) from None
    except HFValidationError:
        raise ModelError(
            f"{name!r} is neither a folder, a .gguf file nor a Hub id (owner/name)",
            "give a folder that holds config.json and *.safetensors, a .gguf file, or a Hub id",
        ) from None
    except LocalEntryNotFoundError:
        raise ModelError(
            f"{name!r} is not on this machine and the Hub cannot be reached",
            "check the network, or give a local folder or .gguf file",
        ) from None
    except Exception as error:  # a missing config.json, a proxy's refusal, a broken download
        raise ModelError(
            f"{name!r} could not be fetched from the Hub: {first_line(error)}",
            "check the name and the network, or give a local folder or .gguf file",
        ) from error


def _hub_answers(name: str) -> bool:
    """Ask the Hub once, before anything is fetched: without a network that would try for 23 s (measured)."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        HfApi().model_info(name, timeout=10)
    except (HFValidationError, RepositoryNotFoundError):
        raise  # not a name; or it answers: no such model, private, gated
    except Exception:  # no network, offline mode, a proxy's refusal: every layer below has its own error
        return False
    return True


def check_folder(folder: Path, *, allow_pickle: bool = False) -> None:
    """Refuse a folder that is not a model, or whose weights are pickled, missing, truncated or outside it."""
    check_config(folder)
    for index in folder.glob("*.index.json"):
        check_index(index)
    if weight_files(folder):
        for file in weight_files(folder):
            check_shard(file)
    elif any(folder.glob("*.bin")):
        if not allow_pickle:
            raise ModelError(
                f"{folder} holds pickled weights (*.bin); reading them can run code that came with the file",
                "convert them to safetensors, or pass --allow-pickle if you trust their source",
            )
    else:
        raise ModelError(f"{folder} holds no weights (*.safetensors)", "give a complete model folder")


def check_config(folder: Path) -> None:
    """Refuse a folder whose config.json is missing or is not one."""
    config = read_json(folder / "config.json", "a model folder needs config.json")
    if not isinstance(config, dict):
        raise ModelError(
            f"{folder / 'config.json'} does not hold an object", "use the model's own config.json"
        )


def weight_files(folder: Path) -> list[Path]:
    """The shards the index names; else model.safetensors; else every safetensors file there is."""
    if (folder / INDEX).is_file():
        return sorted(folder / name for name in set(read_json(folder / INDEX)["weight_map"].values()))
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    return sorted(folder.glob("*.safetensors"))


def check_index(index: Path) -> None:
    """Every shard an index names must lie in the index's own folder and be there."""
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ModelError(f"{index} has no weight_map", "fetch the checkpoint's index again")
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or shard in ("", ".", ".."):
            raise ModelError(
                f"{index} names the shard {shard!r}, which lies outside the model folder",
                "do not use this checkpoint, or mend the index by hand if you made it",
            )
        if not (index.parent / shard).is_file():
            raise ModelError(f"{index} names {shard}, which is not there", "fetch the missing shard again")


def check_shard(file: Path) -> None:
    """A safetensors file must have a readable header and all the bytes that it promises."""
    from safetensors import SafetensorError, safe_open

    try:
        # not mapped: a mapping of the whole file would count against a limit on the process's memory
        with safe_open(file, framework="pt", backend="pread") as shard:
            shard.keys()
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{file} is corrupt or truncated ({file.stat().st_size:,} bytes): {first_line(error)}",
            "fetch this file again",
        ) from None


def read_json(path: Path, need: str = "") -> Any:
    """Read a JSON file, with a ModelError where that cannot be done."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        why = f": {need}" if need else ""
        raise ModelError(f"no file {path}{why}", "give a complete model folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not valid JSON: {first_line(error)}", "fetch this file again") from None
