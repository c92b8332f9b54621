"""What can be refused of a command before anything slow is imported: its options, the model's files, texts, packages,
the run folder, the disk.

No torch is needed. By the same functions the command checks again what it comes to, with the config as its class reads
it.
"""

from __future__ import annotations

import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from layercut.config import HUB_SETS, check_window, no_device
from layercut.config.commands import CutConfig, QuantizeAloneConfig
from layercut.data import sources
from layercut.data.probe_families import capability_names
from layercut.errors import ConfigError, DataError, RunError
from layercut.files import check_new, check_run_folder, hold, is_run, writing
from layercut.models import checkpoints
from layercut.segments import checked_segments, layers_to_remove

OFFLINE = {"--data": "python-docstrings", "--eval-data": "python-docs"}
"""Text that takes the place of the defaults where the Hub cannot be reached: it comes with Python."""
DEVICES = re.compile(r"(auto|cpu|cuda|mps|xpu)(:\d+)?")
PATIENCE = 1.5
"""Seconds that the Hub has to answer."""
HEAD = 1 << 16
"""Bytes of a text that are looked at."""
MANY = 1 << 62


def check(model: str, config: Any, given: set[str]) -> Any:
    """The command's configuration, its default texts replaced where there is no Hub. `given`: flags that were given."""
    path, online, load = Path(model).expanduser(), cache(_online), getattr(config, "load", None)
    journey = config.journey() if hasattr(config, "journey") else None  # evaluate, cut and quantize alone have none
    if journey:
        journey.check()
        capability_names(journey.search.preserve)
    elif isinstance(config, QuantizeAloneConfig):
        config.check()
    # other devices are of packages that torch loads
    if load and not DEVICES.fullmatch(load.device) and not entry_points(group="torch.backends"):
        raise no_device(load.device)
    if checkpoints.is_local(model) and (journey or not is_run(path)):
        checkpoint = checkpoints.resolve(model, allow_pickle=(load or config).allow_pickle)
        layers, positions = checkpoints.stated_sizes(checkpoint)
        if journey:
            _check_sizes(journey, layers, positions)
        elif isinstance(config, CutConfig) and layers:
            checked_segments(config.segments, layers)
    if isinstance(config, CutConfig | QuantizeAloneConfig):
        check_new(config.out, config.force)
        return config
    for flag, source, tokens in _texts(config):
        if flag in OFFLINE and flag not in given:
            config = _with_default(config, flag, source, online)
        else:
            _check_text(flag, source, tokens, online)
    if hasattr(config, "evaluate") or hasattr(config, "compare"):
        sources.check_sources(config.journey())
    _check_packages(path, config)
    if (run := getattr(config, "run", None)) and run.folder:
        _check_out(path, run.out, run.folder)
    return config


def _check_sizes(journey: Any, layers: int | None, positions: int | None) -> None:
    """Refuse rows and cuts that do not fit what the model's files say of it."""
    for flag, window in (("--window", journey.text.window), ("--eval-window", journey.evaluate.eval_window)):
        check_window(flag, window, positions)
    if layers:
        checked_segments(journey.search.segments, layers)
        if journey.search.ratio:
            layers_to_remove(journey.search.ratio, layers)


# --- texts ---


def _texts(config: Any) -> Iterator[tuple[str, str, int]]:
    """(flag, source, tokens) of each text that the command reads."""
    text, heal, evaluate = (getattr(config, name, None) for name in ("text", "heal", "evaluate"))
    if text:
        yield "--data", text.data, text.tokens
    if text and heal and heal.tokens and heal.tune_data:
        yield "--tune-data", heal.tune_data, text.window  # it may be gone over several times
    if evaluate:
        yield "--eval-data", evaluate.eval_data, evaluate.eval_tokens
    elif getattr(config, "eval_data", None):
        yield "--eval-data", config.eval_data, config.eval_tokens


def _with_default(config: Any, flag: str, source: str, online: Callable[[], bool]) -> Any:
    """The text that comes with Python in the place of a default, where the Hub cannot be reached."""
    from layercut.progress import say

    folder = getattr(getattr(config, "run", None), "folder", None)
    begun = folder / "config.yaml" if folder else None
    resumed, line = begun and begun.is_file(), f"{flag[2:].replace('-', '_')}: {OFFLINE[flag]}"
    if begun and resumed and line not in begun.read_text(encoding="utf-8", errors="replace").splitlines():
        return config
    if source not in HUB_SETS or (not resumed and (_there(HUB_SETS[source]) or online())):
        return config
    words = "as the run began" if resumed else "the Hub cannot be reached"
    say("text", f"{words}: {OFFLINE[flag]} in the place of {source}; for another: {flag} FILE.txt")
    if flag == "--data":
        return replace(config, text=replace(config.text, data=OFFLINE[flag]))
    return replace(config, evaluate=replace(config.evaluate, eval_data=OFFLINE[flag]))


def _there(dataset: str) -> bool:
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    kept = Path(os.environ.get("HF_DATASETS_CACHE") or Path(home) / "datasets")
    return (kept / dataset.replace("/", "___")).exists()


def _online() -> bool:
    """Whether the Hub answers, be it with a refusal."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "on", "yes", "true"):
        return False
    address = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=PATIENCE)
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True


def _check_text(flag: str, source: str, tokens: int, online: Callable[[], bool]) -> None:
    """Refuse files that are not there, cannot be read, hold no text or too little of it: a token has a byte or more."""
    usual = OFFLINE.get(flag, "python-docstrings")
    try:
        parts = [sources.find(part, reported=flag == "--eval-data") for part in sources.split_mix(source)]
    except DataError as error:
        hint = error.hint.replace("python-docstrings", usual).replace("--data", flag)
        raise DataError(f"{flag}: {error.message}", hint) from None
    size = 0
    for part in parts:
        if part.hub and not _there(part.hub.path) and not online():
            words = f"{flag} {part.name}: this set is not on this machine and the Hub cannot be reached"
            raise DataError(words, f"{flag} FILE.txt, or {flag} {usual}")
        size += sum(_bytes_of(flag, file) for file in part.files) if part.files else MANY
    if size < tokens:
        raise DataError(
            f"{flag} {source} holds {size:,} bytes, no more tokens than that, and {tokens:,} are needed",
            f"give {flag} more text, or a smaller {'--tokens' if flag == '--data' else flag.replace('data', 'tokens')}",
        )


def _bytes_of(flag: str, file: Path) -> int:
    """Bytes of a .txt file, of another as many as any tokens. DataError: it cannot be read, or is no text."""
    try:
        with file.open("rb") as handle:
            head = handle.read(HEAD)
        size = file.stat().st_size
    except OSError as error:
        raise DataError(f"{flag} {file} cannot be read: {error.strerror}", f"another {flag}") from None
    if file.suffix == ".txt":
        if not head.strip():
            raise DataError(f"{flag} {file} holds no text", f"give {flag} a file with text")
        try:
            head[: len(head) - 3 if len(head) == HEAD else None].decode()
        except UnicodeDecodeError as error:
            if len(head) < HEAD or error.start < HEAD - 8:
                how = f"iconv -f latin1 -t utf-8 {file} > NEW.txt, then {flag} NEW.txt"
                raise DataError(f"{flag} {file} is not UTF-8 text", how) from None
        if b"\0" in head:
            raise DataError(f"{flag} {file} holds bytes that are no text", f"give {flag} a text in UTF-8")
    return size if file.suffix == ".txt" else MANY


# --- packages, the run folder, the disk ---


def _check_packages(path: Path, config: Any) -> None:
    """Refuse a format or a measurement whose package is missing, with the extra that brings it."""
    quantize, tasks, output = (getattr(config, name, None) for name in ("quantize", "tasks", "output"))
    kind = (output and output.gguf_type) or ""
    wanted = {
        "--bits": ("compressed_tensors", "quantize", bool(quantize and quantize.rounds and path.suffix != ".gguf")),
        "--tasks": ("lm_eval", "eval", bool(tasks and tasks.names)),
        f"--gguf-type {kind}": ("llama_cpp_py_sync", "gguf", "_k" in kind or kind.startswith("iq")),
    }
    for flag, (package, extra, needed) in wanted.items():
        if needed and find_spec(package) is None:
            raise ConfigError(
                f"{flag} needs a package that is missing: {package.replace('_', '-')}",
                f'pip install "layercut[{extra}]", or leave out {flag.split()[0]}',
            )


def _check_out(model: Path, out: Path, folder: Path) -> None:
    """Refuse a run folder that another command holds, that cannot be written, or whose disk is too full."""
    above = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if above != folder:
        with writing(folder):  # of a file in a folder's place the system says so
            os.scandir(above).close()
    try:
        check_run_folder(folder)
        if (folder / ".lock").is_file():
            with (folder / ".lock").open("r+") as lock:
                hold(lock, folder)
    except OSError:
        pass  # the run folder itself says what is wrong with it
    weights = [model] if model.is_file() else [*model.glob("*.safetensors")] if model.is_dir() else []
    need, disk = 2 * sum(file.stat().st_size for file in weights), shutil.disk_usage(above)
    if need > disk.free and disk.total:
        raise RunError(
            f"--out {out}: up to {need / 1e6:,.0f} MB are written, twice the model; {disk.free / 1e6:,.0f} MB are free",
            "free some space, or name an --out on another disk",
        )
