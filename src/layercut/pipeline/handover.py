"""What goes with a finished model to who uses it: its card, a Modelfile, mergekit's configuration, and the upload.

At the end of the journey, and of the commands of one stage. A checkpoint folder gets README.md and mergekit.yaml, a
file NAME.gguf gets NAME.README.md and NAME.Modelfile beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from layercut.config import HubConfig
from layercut.errors import ConfigError
from layercut.export import hub
from layercut.export.engines import Written, readings, written_as
from layercut.export.mergekit_config import NAME, mergekit_config
from layercut.export.modelfile import modelfile
from layercut.files.json_values import write_text
from layercut.models import checkpoints
from layercut.models.loading import load_config
from layercut.pipeline.provenance import check_finished, is_run
from layercut.progress import say
from layercut.report.model_card import Made, addressed, checkpoint_card, model_card, of_run
from layercut.report.tables import consumer_rows

CARD = "README.md"


def destination(config: HubConfig) -> str | None:
    """Where the result is to be uploaded, checked before any work begins; None where it is not."""
    return hub.check_destination(config.push_to_hub, private=config.private) if config.push_to_hub else None


def describe_run_(run: Path) -> None:
    """Write the card of a finished run's checkpoint into its folder, and mergekit's configuration of the cut."""
    write_text(run / "model" / CARD, model_card(run))
    _write_mergekit(run / "model", of_run(run))


def result_of(run: Path) -> Path:
    """What a finished run has written: the folder of its model, or the .gguf file in it."""
    files = sorted((run / "model").glob("*.gguf"))
    return files[0] if files and not (run / "model" / "config.json").exists() else run / "model"


def describe_(written: Path, made: Made, run: Path | None = None) -> None:
    """Write what goes with a checkpoint folder or a .gguf file."""
    made = replace(made, consumers=_consumers(written, made))
    for name, text in (_beside(written, made, run)).items():
        write_text(written.parent / name if made.gguf else written / name, text)
    if not made.gguf:
        _write_mergekit(written, made)


def _consumers(written: Path, made: Made) -> list[tuple[str, str, str]]:
    """What other software makes of what was written."""
    kind: Written = "gguf" if made.gguf else "float"
    if made.packed:
        kind = written_as(checkpoints.read_json(written / "config.json")["quantization_config"])
    return consumer_rows(readings(load_config(checkpoints.resolve(str(written))), [], kind))


def _beside(written: Path, made: Made, run: Path | None) -> dict[str, str]:
    card = checkpoint_card(made, run)
    if not made.gguf:
        return {CARD: card}
    return {f"{written.stem}.{CARD}": card, f"{written.stem}.Modelfile": modelfile(written)}


def _write_mergekit(folder: Path, made: Made) -> None:
    """mergekit.yaml, where layers were removed from a model that has a name elsewhere."""
    if made.segments and made.original_layer_index and made.source.base_model:
        config = checkpoints.read_json(folder / "config.json")
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
        write_text(folder / NAME, mergekit_config(made.source.base_model, made.original_layer_index, dtype))


def push(target: str, name: str, *, private: bool = False) -> str:
    """Upload a finished run's model, a checkpoint folder or a .gguf file."""
    path = Path(target)
    if is_run(path):
        check_finished(path, "push")
        path = result_of(path)
    elif path.is_dir():
        checkpoints.check_folder(path)
    elif path.suffix != ".gguf" or not path.is_file():
        raise ConfigError(f"nothing at {target} that could be uploaded", "a run folder, a checkpoint folder, NAME.gguf")
    return upload(path, hub.check_destination(name, private=private), private=private)


def upload(path: Path, repo_id: str, *, private: bool = False) -> str:
    """Upload a checkpoint folder, or a .gguf file with what is beside it."""
    files: dict[str, Path | bytes] = {}
    files |= hub.folder_files(path) if path.is_dir() else _gguf_files(path)
    card = files.get(CARD)
    if isinstance(card, Path):
        files[CARD] = addressed(card.read_text(encoding="utf-8"), repo_id).encode()
    address = hub.push(files, repo_id, private=private, replaces_weights=path.is_dir())
    say("upload", f"{len(files)} files: {address}")
    return address


def _gguf_files(path: Path) -> Mapping[str, Path]:
    """By the names that they have in a repository."""
    beside = {CARD: path.with_name(f"{path.stem}.{CARD}"), "Modelfile": path.with_name(f"{path.stem}.Modelfile")}
    return {path.name: path} | {name: file for name, file in beside.items() if file.is_file()}
