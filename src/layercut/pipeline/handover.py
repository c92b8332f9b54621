"""A finished model for who uses it: `layercut export`, what goes with every result, and the upload to the Hub.

A checkpoint folder gets README.md and mergekit.yaml, a file NAME.gguf gets NAME.README.md and NAME.Modelfile beside it.
The formats themselves are exporters (`export/formats.py`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from layercut.config import consumer_names
from layercut.config.commands import ExportConfig
from layercut.errors import ConfigError
from layercut.export import engines, hub
from layercut.export.formats import AS_THEY_CAME, FLOATS, ExportSource
from layercut.export.modelfile import modelfile
from layercut.files import appearing, is_run, read_json, write_json, write_text
from layercut.models import checkpoints
from layercut.models.loading import load_config
from layercut.pipeline.run_folder import check_finished
from layercut.progress import say
from layercut.registries import exporters
from layercut.report.model_card import Made, addressed, checkpoint_card, from_folder, of_run, perplexity_again
from layercut.report.page import write_report
from layercut.report.run_facts import model_key, runs_of
from layercut.report.sections import engine_rows
from layercut.report.stage_lines import describe_export, describe_gguf_check
from layercut.report.verdicts import broken

CARD = "README.md"


def export(target: str, config: ExportConfig) -> Path:
    """Write a finished run's model, or a checkpoint, in the format that is asked for.

    It takes its name only when the exporter has ended well, and GGUF and safetensors are read back, compared and
    measured again by then. Of a GGUF file the run's `gguf.json` holds what was found, the tensor types really written,
    and whether the file is broken; the report shows it.
    """
    place, exporter = Path(target), exporters.get(config.format)
    run = place if is_run(place) else None
    if run:
        check_finished(run, "export")
    source = ExportSource(run / "model" if run else place, run)
    own = config.format in exporters.own  # a package's format is its own business
    if own:
        stock = load_config(checkpoints.resolve(str(source.model)))
        kind: engines.Written = "gguf" if config.format == "gguf" else "float"
        engines.check_cut(stock, [], consumer_names(config.consumers), kind)
        engines.warn_misread("export", engines.readings(stock, [], kind))
    with appearing(config.out, force=config.force, within=True, source=place) as work:
        written = work / config.out.name
        facts = exporter(source, written, config) or {}
        if not written.exists():
            raise ConfigError(f"the exporter {config.format} wrote nothing to {written.name}", "correct the exporter")
        files = [file for file in (written, *written.rglob("*")) if file.is_file()]
        facts |= {"file": config.out.name, "bytes": sum(file.stat().st_size for file in files)}
    if config.format == "gguf":
        say_gguf(facts)
        if run:
            _keep(run, facts)
    elif config.format == "safetensors":
        say("export", describe_export(facts, config.out))
    else:
        for key, value in facts.items():
            say("export", f"{key}: {value}")
    if own:
        plain = of_run(run) if run else from_folder(place)
        made = _made_gguf(plain, run, config.out, facts) if config.format == "gguf" else None
        floats = replace(plain, done="Float weights as a checkpoint folder.", number_format="", packed=False)
        describe_(config.out, made or floats, run)
    return config.out


def say_gguf(facts: dict[str, Any], where: str = "") -> None:
    types = ", ".join(f"{kind} {count}" for kind, count in facts["tensor_types"].items())
    say("export", f"{facts['bytes']:,} bytes; tensors: {types}{where}")
    for words in describe_gguf_check(facts):
        say("check", words)


def _made_gguf(plain: Made, run: Path | None, file: Path, facts: dict[str, Any]) -> Made:
    types = ", ".join(f"{kind} ({count})" for kind, count in facts["tensor_types"].items())
    value, kind = _perplexity(facts["again"]), facts["kind"].upper()
    figures = [perplexity_again(run, value, facts["again"]["tokens"])] if run and value else []
    if facts["kind"] in AS_THEY_CAME:
        kind = next((name for name in facts["tensor_types"] if name not in FLOATS), "F32")
    done, number_format = f"As a GGUF file; tensors: {types}.", "" if kind in FLOATS else kind
    return replace(plain, done=done, number_format=number_format, packed=False, gguf=file.name, figures=figures)


def _perplexity(again: dict[str, Any]) -> float | None:
    """Of a GGUF file in transformers, or where that does not read it in llama.cpp."""
    return again["perplexity"]["file"] or (again["llama_cpp"] or {}).get("perplexity")


def _keep(run: Path, facts: dict[str, Any]) -> None:
    """gguf.json in the run's folder, and the report again.

    Whether the file is broken is told with it in the place of the quantized model. It was measured on fewer tokens than
    the run's own: taken is the run's last perplexity before quantization, times what writing the file did to it.
    """
    summary, written = read_json(run / "summary.json"), _perplexity(facts["again"])
    figures = summary["perplexity"] | {"quantized": None}
    last = [figures[name] for name in ("cut", "folded", "tuned") if figures[name] is not None]
    if last and written:
        figures["quantized"] = last[-1] * written / facts["again"]["perplexity"]["model"]
    facts["broken"] = broken(summary | {"perplexity": figures})
    if facts["broken"]:
        say("warning", facts["broken"])
    write_json(run / "gguf.json", facts | {"run": model_key(run)})
    write_report(run)


# --- what goes with a result ---


def result_of(run: Path) -> Path:
    """What a finished run has written: the folder of its model, or the .gguf file in it."""
    files = sorted((run / "model").glob("*.gguf"))
    return files[0] if files and not (run / "model" / "config.json").exists() else run / "model"


def describe_result_(run: Path) -> None:
    """Write what goes with a finished run's result; of a .gguf file also gguf.json, for the report."""
    file, made = result_of(run), of_run(run)
    if file.suffix == ".gguf":
        facts = dict(read_json(run / "export.json")["gguf"])
        _keep(run, facts)
        describe_(file, _made_gguf(made, run, file, facts), run)
    else:
        write_text(file / CARD, checkpoint_card(made, run))
        _write_mergekit(file, made)


def describe_(written: Path, made: Made, run: Path | None = None) -> None:
    """Write what goes with a checkpoint folder or a .gguf file."""
    kind: engines.Written = "gguf" if made.gguf else "float"
    if made.packed:
        kind = engines.written_as(read_json(written / "config.json")["quantization_config"])
    found = engines.readings(load_config(checkpoints.resolve(str(written))), [], kind)
    card = checkpoint_card(replace(made, consumers=engine_rows(found)), run)
    if made.gguf:
        write_text(written.with_name(f"{written.stem}.{CARD}"), card)
        write_text(written.with_name(f"{written.stem}.Modelfile"), modelfile(written))
    else:
        write_text(written / CARD, card)
        _write_mergekit(written, made)


def _write_mergekit(folder: Path, made: Made) -> None:
    """mergekit.yaml, where layers were removed from a model that has a name elsewhere.

    The cut is mergekit's passthrough merge of one model with itself: each slice copies a run of its layers.
    """
    if not (made.segments and made.original_layer_index and made.source.base_model):
        return
    config, source = read_json(folder / "config.json"), made.source.base_model
    slices = [{"sources": [{"model": source, "layer_range": run}]} for run in runs_of(made.original_layer_index)]
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    content = {"slices": slices, "merge_method": "passthrough", "dtype": dtype}
    about = "# The cut alone, as it was before healing: mergekit-yaml mergekit.yaml OUT\n"
    write_text(folder / "mergekit.yaml", about + yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


# --- to the Hub ---


def push(target: str, name: str, *, private: bool = False) -> str:
    """Upload a finished run's model, a checkpoint folder, or a .gguf file with what is beside it."""
    path = Path(target)
    if is_run(path):
        check_finished(path, "push")
        path = result_of(path)
    elif path.is_dir():
        checkpoints.check_folder(path)
    elif path.suffix != ".gguf" or not path.is_file():
        raise ConfigError(f"nothing at {target} that could be uploaded", "a run folder, a checkpoint folder, NAME.gguf")
    repo_id = hub.check_destination(name, private=private)
    found: dict[str, Path]
    if path.is_dir():
        inside = {file.relative_to(path): file for file in sorted(path.rglob("*")) if file.is_file()}
        hidden = {name for name in inside if any(part.startswith(".") for part in name.parts)}
        found = {str(name): file for name, file in inside.items() if name not in hidden}
    else:
        beside = {CARD: path.with_name(f"{path.stem}.{CARD}"), "Modelfile": path.with_name(f"{path.stem}.Modelfile")}
        found = {path.name: path} | {name: file for name, file in beside.items() if file.is_file()}
    files: dict[str, Path | bytes] = {**found}
    if CARD in found:
        files[CARD] = addressed(found[CARD].read_text(encoding="utf-8"), repo_id).encode()
    address = hub.push(files, repo_id, private=private, replaces_weights=path.is_dir())
    say("upload", f"{len(files)} files: {address}")
    return address
