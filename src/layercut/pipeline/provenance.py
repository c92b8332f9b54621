"""Who made a run folder, with what, and with which settings: env.json and config.yaml. Below `pipeline/run_store.py`.

A folder is a run of layercut where its env.json says with which layercut it was made; a config.yaml alone does not show
that. env.json describes the first command in full, and under "commands" every one that was given for the folder.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from layercut import __version__
from layercut.config import split_names
from layercut.data.sources import split_mix
from layercut.errors import RunError
from layercut.models import checkpoints

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "datasets", "numpy", "compressed-tensors", "peft")
PROGRAM = "layercut"
"""What `python -m layercut.cli` is called, as a launcher of several processes starts it."""
SUMMARIES = ("summary.json", "compare.json")
"""What a finished `compress` leaves, and a finished `compare`."""
SAME = {"out", "device", "stream", "shard", "device_map", "max_memory", "push_to_hub", "private"}
"""Settings that change where a run is computed or what becomes of it, and not what it finds."""
MORE: dict[str, Any] = {
    "speed": False, "tasks": "", "evaluations": "", "probes": False, "long_context": 0,
}  # fmt: skip
"""Settings that measure more without changing the model, and the value of each at which it measures nothing: from that
to another one nothing is lost."""
PATHS = {"model", "data", "eval_data", "tune_data", "include_path"}
"""Settings that name files, text several of them; of what is no file the name alone counts."""
LISTS = {"tasks", "evaluations"}
"""Of these, several by name: where others come beside all that there were, nothing is lost."""
APART = {"tasks", "evaluations", "probes", "long_context"}
"""Of these, the ones whose artefacts are of their own, and stay where it is not asked for them."""
MEASURED = {*MORE, "limit", "include_path", "eval_data", "eval_tokens", "eval_window", "methods", "states"}
"""Settings that change what is measured and not the model."""


# --- whose folder it is ----------------------------------------------------------------------------------------------


def is_run(folder: Path) -> bool:
    """Whether a folder is a run of layercut."""
    made_with = _object(folder / "env.json").get("versions")
    return isinstance(made_with, dict) and "layercut" in made_with


def check_finished(run: Path, command: str) -> None:
    """Refuse a run folder whose journey has not reached its end."""
    hint = f"give its compress command again, then {command}"
    if not (run / "summary.json").is_file():
        raise RunError(f"the run in {run} is not finished", hint)
    if not isinstance(_object(run / "summary.json").get("model"), str):
        raise RunError(f"{run / 'summary.json'} is damaged", hint)


def models_of(run: Path, command: str, *, allow_pickle: bool = False) -> dict[str, str]:
    """The two models of a finished run: the one that it was made of, as it was then, and what it made of it."""
    check_finished(run, command)
    dense = _object(run / "summary.json")["model"]
    if checkpoints.resolve(dense, allow_pickle=allow_pickle).changed_since(run / checkpoints.DIGESTS):
        raise RunError(
            f"{dense} is another model than the one that {run} was made of", "put that one back, or compress this one"
        )
    return {"dense": dense, "compressed": str(run / "model")}


def is_finished(folder: Path) -> bool:
    """Whether a folder holds a model that a run made, or a finished comparison."""
    return (folder / "export.json").exists() or (folder / "compare.json").exists()


def is_empty(folder: Path) -> bool:
    """Whether nothing is in a folder but what a layercut command leaves that was killed at its very beginning."""
    return all(path.name == ".lock" or path.name.endswith(".partial") for path in folder.iterdir())


# --- what a command would replace ------------------------------------------------------------------------------------


def would_be_lost(folder: Path, config: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The settings in which a finished run differs from others, and what of it these would replace.

    Both are empty where nothing that is finished would be lost: of a run that was stopped, of one with the same
    settings, and where new settings only measure more. A setting that the run does not know is of a newer layercut,
    and those that `config` does not know are of another command.
    """
    before, config = settings(folder), yaml.safe_load(yaml.safe_dump(dict(config)))
    changed = _changed(before, config)
    if not changed:
        return [], []
    summaries = [name for name in SUMMARIES if (folder / name).exists()]
    model = (folder / "export.json").exists() and any(key not in MEASURED for key in changed)
    if not model and not (summaries and any(not _only_more(key, before, config) for key in changed)):
        return [], []
    words = [f"{key} was {_value(before[key])} and is {_value(config[key])}" for key in changed if key in config]
    if first := next((key for key in changed if key not in config), None):
        words.append(f"it is of another command, which has {first} and others that this one does not take")
    names = ("model", *summaries, "report.html", "compare.html")
    return words, [name for name in names if (folder / name).exists() and (model or name != "model")]


def differences(folder: Path, config: Mapping[str, Any]) -> set[str]:
    """The settings in which what the folder will hold is of others than what it holds."""
    before, config = settings(folder), yaml.safe_load(yaml.safe_dump(dict(config)))
    return {*_changed(before, config), *_changed(config, before)}


def _changed(before: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    compared = (key for key in before if key not in SAME)
    return [key for key in compared if _named(key, config.get(key)) != _named(key, before[key])]


def _named(key: str, value: Any) -> Any:
    """A setting's value, that of a path alike from wherever it is given."""
    if key not in PATHS or not isinstance(value, str):
        return value
    parts = split_mix(value) if key.endswith("data") else [value]
    return [os.path.abspath(os.path.expanduser(each)) for each in parts]


def _only_more(key: str, before: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether a setting of a finished run changes so that all that was measured stays, in some artefact."""
    if key not in config:
        return False
    if key in ("limit", "include_path"):
        return not (before.get("tasks") and config.get("tasks"))
    if key in LISTS and before[key] and {*split_names(before[key])} <= {*split_names(config[key])}:
        return True
    # every method of a comparison, and every state of its cut, has artefacts of its own
    return key in ("methods", "states") or (
        key in MORE and MORE[key] in (before[key], *([config[key]] if key in APART else []))
    )


def _value(value: Any) -> str:
    return "not given" if value is None else str(value)


def settings(folder: Path) -> dict[str, Any]:
    """config.yaml; empty where it cannot be read."""
    try:
        found = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


# --- with what it is made --------------------------------------------------------------------------------------------


def described(folder: Path, processes: int, *, anew: bool) -> dict[str, Any]:
    """env.json: of the command that began what the folder holds, and under "commands" of every one that was given."""
    now, before = environment() | {"processes": processes}, _object(folder / "env.json")
    earlier = before.pop("commands", None)
    if not isinstance(earlier, list):
        earlier = [_command(before)] if "command" in before else []
    first = now if anew or "command" not in before else before
    return first | {"commands": [*earlier, _command(now)]}


def _command(env: dict[str, Any]) -> dict[str, Any]:
    return {key: env[key] for key in ("date", "command", "hardware", "processes", "versions") if key in env}


def other_versions(folder: Path) -> list[str]:
    """Packages that are of another version now than when the folder's run was begun, in words."""
    before, now = _object(folder / "env.json").get("versions"), versions()
    if not isinstance(before, dict):
        return []
    return [f"{name} {before[name]} -> {now[name]}" for name in now if name in before and before[name] != now[name]]


def versions() -> dict[str, str]:
    """Versions of Python, of layercut, and of the packages that results depend on."""
    return dict(_installed())


@cache
def _installed() -> dict[str, str]:
    """Read once: every stage of a run records them."""
    found = {"python": platform.python_version(), "layercut": __version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, Any]:
    """What ran this: hardware, platform, versions, the command."""
    import torch

    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": [PROGRAM if Path(sys.argv[0]).name == "__main__.py" else Path(sys.argv[0]).name, *sys.argv[1:]],
        "platform": platform.platform(),
        "hardware": accelerator_name() or cpu_name(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "float32_products": torch.get_float32_matmul_precision(),
        "versions": versions(),
    }


def accelerator_name() -> str | None:
    """The name of the first accelerator that is there."""
    import torch

    kind = torch.accelerator.current_accelerator(check_available=True)
    named = getattr(torch.get_device_module(kind), "get_device_name", None) if kind else None
    if kind is None:
        return None
    return named() if named else kind.type  # Apple's has no name


def cpu_name() -> str:
    """The processor's own name, where the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _object(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
