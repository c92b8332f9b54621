"""From a model's name to files on this machine, checked: a Hub id or a .gguf file there, a local folder or .gguf file.

First stage of the journey: everything after this module deals with files. Pickled weights are refused unless asked for,
shard names may not leave the folder, and JSON is read within limits (`files.py`) and checked
(`models/config_files.py`) before a class of transformers sees it. Which files hold the weights is decided here alone,
as transformers decides it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import errors, try_to_load_from_cache
from huggingface_hub.utils import validate_repo_id

from layercut.errors import ModelError, first_line
from layercut.files import content_digest, open_regular, read_json, write_json
from layercut.models import config_files
from layercut.models.gguf_header import read_header

if TYPE_CHECKING:
    import torch

DIGESTS = ".digests.json"  # in a run folder: the hashes of the files that its model was read from
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLE_INDEX, PICKLE_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
WEIGHT_PATTERNS = ["*.safetensors", "*.safetensors.index.json"]
PICKLE_PATTERNS = ["*.bin", "*.bin.index.json"]
OTHER_PATTERNS = ["*.json", "*.model", "*.txt", "*.jinja", "additional_chat_templates/*.jinja", "*.tiktoken"]
CARD = "README.md"  # fetched along, for the card of what is made of the model; no part of the model
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
HUB_FILE = re.compile(rf"({HUB_ID.pattern}):(.+\.gguf)", re.ASCII)
"""A .gguf file in a repository of the Hub: OWNER/NAME:FILE.gguf."""
SHOWN_FILES = 8
ALLOWED = "a folder that holds config.json and *.safetensors, a .gguf file, or a Hub id"


@dataclass(frozen=True)
class Checkpoint:
    """A model on this machine's disk: a folder, or a folder and the .gguf file in it."""

    name: str
    folder: Path
    gguf: str | None = None

    @property
    def file(self) -> Path:
        return self.folder / self.gguf if self.gguf else self.folder

    @property
    def gguf_path(self) -> str | None:
        """What transformers is given as `gguf_file`: of a bare name it prefers the one in the current folder."""
        return str(self.file.absolute()) if self.gguf else None

    def files(self) -> list[Path]:
        """The files that a model is read from: weights, config, tokenizer, code; not its card, licence or scores.

        Beside a GGUF file a tokenizer, which is read where the file's own cannot be.
        """
        if self.gguf:
            tokenizer = [self.folder / name for name in ("tokenizer.json", "tokenizer_config.json")]
            return [self.file, *(path for path in tokenizer if path.is_file())]
        beside = {path for pattern in [*OTHER_PATTERNS, "*.py"] for path in self.folder.glob(pattern)}
        if not any(path.suffix == ".py" for path in beside):  # which may read anything
            unread = ("results.json", "trainer_state.json")
            texts = {path for path in beside if path.suffix == ".txt" and not path.name.startswith(("vocab", "merges"))}
            beside -= texts | {path for path in beside if path.name.endswith(unread)}
        weights = weight_files(self.folder) or list(self.folder.glob("*.bin"))
        return sorted(path for path in {*beside, *weights} if path.is_file() and not path.name.startswith("."))

    def fingerprint(self, memo: Path | None = None, advance: Callable[[int], None] = lambda size: None) -> str:
        """Hash of the content of all files that a model is read from: equal for copies, changed by any edit."""
        known = _remembered(memo)
        noted: dict[str, Any] = {}
        for path in self.files():
            noted[path.name] = _noted(path, known)
            advance(noted[path.name][0])
        if memo and noted != known:
            write_json(memo, noted)
        digests = {name: facts[-1] for name, facts in noted.items()}
        return hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16]

    def changed_since(self, memo: Path) -> bool:
        """Whether a file's content is another than `fingerprint` noted in a memo, where that names the file."""
        known = _remembered(memo)
        return any(_noted(path, known)[-1] != known[path.name][-1] for path in self.files() if path.name in known)


def _noted(path: Path, known: dict[str, list[Any]]) -> list[Any]:
    """Size, times of change, inode and hash of a file, as a memo has it; hashed where it knows no such file."""
    facts = path.stat()
    state = [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino]
    old = known.get(path.name)
    return old if old and old[:-1] == state else [*state, content_digest(path)]


def _remembered(memo: Path | None) -> dict[str, list[Any]]:
    try:
        found = read_json(memo) if memo else {}
    except ModelError:  # not there, or not what was written: hash again
        return {}
    noted = found.items() if isinstance(found, dict) else ()
    return {name: facts for name, facts in noted if isinstance(facts, list) and facts}


# --- from a name to files -------------------------------------------------------------------------------------


def is_local(name: str) -> bool:
    """Whether MODEL names a path of this machine, there or not; else it is fetched from the Hub."""
    path = Path(name).expanduser()
    rooted = path.suffix == ".gguf" or name.count("/") > 1 or name.startswith((".", "/", "~")) or not name.strip()
    return os.path.exists(path) or (rooted and not HUB_FILE.fullmatch(name))


def resolve(name: str, *, allow_pickle: bool = False, weights: bool = True) -> Checkpoint:
    """Turn MODEL into files on this machine; downloads where needed. weights: whether they are, and are checked."""
    path = Path(name).expanduser()
    try:
        is_file, is_dir = path.is_file(), path.is_dir() and bool(name.strip())
    except (OSError, ValueError) as error:  # a name too long, a folder that may not be entered
        raise ModelError(f"{name!r} cannot be read: {first_line(error)}", "check the path of the model") from None
    if not is_file and (found := HUB_FILE.fullmatch(name)):
        return _gguf_at(name, _fetch(found[1], found[2]))
    if path.suffix == ".gguf" or is_file:
        return _gguf_at(name, path)
    if is_dir:
        ggufs = [] if (path / "config.json").exists() else sorted(path.glob("*.gguf"))
        if len(ggufs) > 1:
            words = f"{path} holds {len(ggufs)} .gguf files: {_listed([file.name for file in ggufs])}"
            raise ModelError(words, f"give one: {ggufs[0]}")
        if ggufs:
            return _gguf_at(name, ggufs[0])
        folder = path.resolve()
    elif is_local(name):
        words = f"no model at {name!r}: neither a folder nor a .gguf file, and not a Hub id (owner/name)"
        raise ModelError(words, f"give {ALLOWED}")
    else:
        folder = path = _fetch(name, allow_pickle=allow_pickle and weights, weights=weights)
    if weights:
        check_folder(path, allow_pickle=allow_pickle)
    else:
        check_config(path)
    return Checkpoint(name, folder)


def _gguf_at(name: str, path: Path) -> Checkpoint:
    if not path.is_file():
        raise ModelError(f"no file {name!r}", "check the path of the .gguf file")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(f"{name!r} is not a GGUF file (it starts with {magic!r})", f"give {ALLOWED}")
    # the Hub's cache links to a file without this name, whose folder holds no other: the link is what is read
    return Checkpoint(name, path.parent.resolve(), path.name)


def names_a_gguf(name: str) -> bool:
    """Whether a model's name is that of a .gguf file, told without reading or fetching it."""
    path = Path(name).expanduser()
    return name.endswith(".gguf") or path.is_file() or (path.is_dir() and not (path / "config.json").exists())


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN_FILES} more" if len(names) > SHOWN_FILES else ""
    return ", ".join(names[:SHOWN_FILES]) + more


def _fetch(name: str, file: str = "", *, allow_pickle: bool = False, weights: bool = True) -> Path:
    """A model's files from the Hub, or one .gguf file; an earlier fetch where the Hub cannot be reached."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    local = "give a local folder or .gguf file"
    try:
        try:  # asked once, before anything is fetched: without a network that would try for 23 s (measured)
            info, offline = HfApi().model_info(name, timeout=10), False
        except (errors.HFValidationError, errors.RepositoryNotFoundError):
            raise  # not a name; or it answers: no such model, private, gated
        except Exception:  # no network, offline mode, a proxy's refusal: every layer below has its own error
            info, offline = None, True
        names = [sibling.rfilename for sibling in getattr(info, "siblings", None) or []]
        ggufs = sorted(each for each in names if each.endswith(".gguf"))
        if offline and weights and not file:
            return Path(snapshot_download(name, local_files_only=True))
        try:
            found = Path(hf_hub_download(name, file or "config.json", local_files_only=offline))
        except errors.EntryNotFoundError as error:
            if isinstance(error, errors.LocalEntryNotFoundError) or not (file or ggufs):
                raise
            has = f"has no file {file!r}; it has " if file else "holds GGUF files and no config.json: "
            one = f"{'' if file else 'give one: '}{name}:{ggufs[0]}" if ggufs else ""
            words = f"{name!r} {has}{_listed(ggufs) if ggufs else 'no .gguf file'}"
            raise ModelError(words, one or "give a repository that holds .gguf files") from None
        if file or not weights:
            return found if file else found.parent
        patterns = [*WEIGHT_PATTERNS, *OTHER_PATTERNS, CARD, *(PICKLE_PATTERNS if allow_pickle else [])]
        left_out = ["original/*", "consolidated*"]
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=left_out))
    except ModelError:
        raise
    except errors.GatedRepoError:
        hint = f"accept the terms at https://huggingface.co/{name}, then run `hf auth login`"
        raise ModelError(f"{name!r} is gated: its owner must grant you access first", hint) from None
    except errors.RepositoryNotFoundError:
        hint = "check the spelling; for a private model run `hf auth login` first"
        raise ModelError(f"no model {name!r} on the Hub, and no such folder here", hint) from None
    except errors.HFValidationError:
        words = f"{name!r} is neither a folder, a .gguf file nor a Hub id (owner/name)"
        raise ModelError(words, f"give {ALLOWED}") from None
    except errors.LocalEntryNotFoundError:
        words = f"{name!r} is not on this machine and the Hub cannot be reached"
        raise ModelError(words, f"check the network, or {local}") from None
    except Exception as error:  # a missing config.json, a proxy's refusal, a broken download
        words = f"{name!r} could not be fetched from the Hub: {first_line(error)}"
        raise ModelError(words, f"check the name and the network, or {local}") from error


# --- what a folder must hold ----------------------------------------------------------------------------------


def check_folder(folder: Path, *, allow_pickle: bool = False) -> None:
    """Refuse a folder that is not a model, or whose weights are pickled, missing, truncated or outside it."""
    check_config(folder)
    for name in ("generation_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).exists():
            config_files.check_object(read_json(folder / name), str(folder / name))
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{folder} holds an adapter (adapter_config.json) beside or instead of a model",
            "merge it into its model first (peft: merge_and_unload), or take its files out of the folder",
        )
    if index := used_index(folder):
        _check_index(index)
    if weight_files(folder):
        stored_tensors(folder)
        return
    pickled, other = any(folder.glob("*.bin")), sorted(file.name for file in folder.glob("*.safetensors"))
    if other and not (pickled and allow_pickle):
        raise ModelError(
            f"{folder} holds {other[0]}, a name that transformers does not read, and no weights under one that it does",
            f"give a complete model folder: {SINGLE}, or shards and {INDEX}",
        )
    if not pickled:
        raise ModelError(f"{folder} holds no weights (*.safetensors)", "give a complete model folder")
    if not allow_pickle:
        words = f"{folder} holds pickled weights (*.bin); reading them can run code inside the file"
        raise ModelError(words, "convert them to safetensors, or pass --allow-pickle if you trust their source")
    if not (folder / PICKLE_SINGLE).is_file() and (folder / PICKLE_INDEX).is_file():
        _check_index(folder / PICKLE_INDEX)


def check_config(folder: Path) -> None:
    """Refuse a folder whose config.json is missing, is not one, or says what no class should be built from."""
    config = read_json(folder / "config.json", "a model folder needs config.json")
    config_files.check_config(config, str(folder / "config.json"))


def _check_index(index: Path) -> None:
    """Every shard an index names must lie in the index's own folder and be there."""
    for shard in config_files.shards_of(read_json(index), str(index)):
        if not (index.parent / shard).is_file():
            raise ModelError(f"{index} names {shard}, which is not there", "fetch the missing shard again")


def used_index(folder: Path) -> Path | None:
    """The index that transformers would read: where there is model.safetensors, none."""
    return folder / INDEX if (folder / INDEX).is_file() and not (folder / SINGLE).is_file() else None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would take a folder's weights from.

    model.safetensors; else the shards that the index names; else none, whatever other names there are.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if index := used_index(folder):
        return [folder / name for name in config_files.shards_of(read_json(index), str(index))]
    return []


def stated_sizes(checkpoint: Checkpoint) -> tuple[int | None, int | None]:
    """Decoder layers and positions that the files state; None where they do not. What counts is the config's class."""
    if checkpoint.gguf:
        header = read_header(checkpoint.file)
        return header.layers, header.facts().get("context_length")
    return config_files.stated_sizes(read_json(checkpoint.folder / "config.json"))


def weight_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the weight files on disk, in whatever dtype; pickled ones where there are no others."""
    folder = checkpoint.folder
    files = [checkpoint.file] if checkpoint.gguf else weight_files(folder) or sorted(folder.glob("*.bin"))
    return sum(file.stat().st_size for file in files)


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file, known from the header; transformers' loader takes it for one without data."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int  # its first byte, counted from the start of the file
    size: int

    def __getitem__(self, key: Any) -> Stored:
        return self

    def to(self, *, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        import torch

        return torch.empty(self.shape, dtype=dtype, device="meta")


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """The tensors of a folder's safetensors files by name. ModelError: one is corrupt, truncated or gone."""
    from safetensors import safe_open

    found: dict[str, Stored] = {}
    for file in weight_files(folder):
        try:
            # a sound header; not mapped: a mapping of the whole file would count against a limit on the memory
            with safe_open(file, framework="np", backend="pread"), file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            for name, facts in header.items():
                start, stop = facts["data_offsets"]
                shape = tuple(facts["shape"])
                found[name] = Stored(file, name, facts["dtype"], shape, 8 + length + start, stop - start)
        except Exception as error:  # its own kind, the system's, or Python's for numbers that are none
            size = f"{file.stat().st_size:,} bytes" if file.exists() else "not there"
            words = f"{file} is corrupt or truncated ({size}): {first_line(error)}"
            raise ModelError(words, "fetch this file again") from None
    return found


def stored_elements(folder: Path) -> int:
    return sum(prod(tensor.shape) for tensor in stored_tensors(folder).values())


# --- what a model says of itself ------------------------------------------------------------------------------------

# For the card of what is made of it: from the README.md of a folder or of the Hub's copy on this machine, or from the
# metadata of a GGUF file. What is not said there is None, and nothing is guessed.

CACHED = re.compile(r"models--([^/]+?)--([^/]+)")  # the folder of a model in huggingface_hub's cache
LICENCE = ("license", "license_name", "license_link")
GGUF_ADDRESSES = ("general.repo_url", "general.source.repo_url", "general.source.huggingface.repository")
QUANTIZED_NAME = re.compile(r"[.-](I?Q\d\w*|TQ\d\w*|B?F16|F32|MXFP4\w*)$", re.IGNORECASE)
"""How the stem of a GGUF file's name ends that says its number format."""
LONGEST_CARD, LONGEST_VALUE = 4 * 2**20, 200


@dataclass(frozen=True, kw_only=True)
class SourceCard:
    """Who a model is, as far as that is known."""

    name: str  # of the model, of its folder or of its file; never a path
    hub_id: str | None = None  # owner/name on the Hub
    license: str | None = None
    """As the Hub names it, such as apache-2.0; with "other", `license_name` and `license_link` say which."""
    license_name: str | None = None
    license_link: str | None = None
    languages: tuple[str, ...] = ()  # codes such as en
    is_first: bool = False  # whether it is the model that a folder was once made from by layercut, and not that folder

    @property
    def base_model(self) -> str | None:
        """What the Hub's `base_model` takes: the id, else the name where it has the form of one."""
        try:
            validate_repo_id(self.hub_id or self.name)
        except errors.HFValidationError:
            return None
        return self.hub_id or self.name


def source_card(model: str) -> SourceCard:
    path = Path(model).expanduser()
    stem = QUANTIZED_NAME.sub("", path.stem) if path.suffix == ".gguf" else path.name  # without the number format
    cached = CACHED.search(str(path))
    hub_id = f"{cached[1]}/{cached[2]}" if cached else None
    if path.is_file():  # not by general.name: what converters write there is often the folder of a training run
        try:
            values = read_header(path).values
        except ModelError:
            values = {}
        for address in (str(values.get(key, "")) for key in GGUF_ADDRESSES):
            found = HUB_ID.fullmatch(address.removeprefix("https://huggingface.co/").rstrip("/"))
            hub_id = hub_id or (found[0] if found else None)
        front = {key: values.get(f"general.{key.replace('_', '.')}") for key in LICENCE}
        return _described(stem, hub_id, front | {"language": values.get("general.languages")})
    if path.is_dir():
        front = _front_matter(path / "README.md")
        bases = _texts(front.get("base_model"))
        if hub_id is None and bases and "layercut" in _texts(front.get("tags")):  # what was made of a model is that one
            known = next((base for base in bases if HUB_ID.fullmatch(base)), None)
            return replace(_described(bases[0].rpartition("/")[2], known, front), is_first=True)
        return _described(hub_id.rpartition("/")[2] if hub_id else path.resolve().name, hub_id, front)
    if HUB_ID.fullmatch(model):
        readme = try_to_load_from_cache(model, CARD)  # fetched with the weights
        front = _front_matter(Path(readme)) if isinstance(readme, str) else {}
        return _described(model.rpartition("/")[2], model, front)
    return _described(stem or "model", hub_id, {})  # it is not there any more


def _described(name: str, hub_id: str | None, front: dict[str, Any]) -> SourceCard:
    """With what a card's front matter says, as far as it is text of one line and of a bearable length."""
    found: dict[str, Any] = {key: next(iter(_texts(front.get(key))), None) for key in LICENCE}
    shown = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    return SourceCard(name=shown, hub_id=hub_id, languages=tuple(_texts(front.get("language"))), **found)


def _front_matter(path: Path) -> dict[str, Any]:
    """The YAML between the two --- at the top of a README.md; empty where there is none that can be read."""
    try:
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
