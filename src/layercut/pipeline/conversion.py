"""A finished run's model, or a checkpoint folder, in another file format: what `layercut export` does.

Beside `pipeline/journey.py`, like `cli/single_stage.py`. The format itself is an exporter (`export/formats.py`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from layercut.config import ExportConfig, consumer_names
from layercut.errors import ConfigError
from layercut.export import engines
from layercut.export.formats import ExportSource
from layercut.export.gguf_export import AS_THEY_CAME
from layercut.export.gguf_measured import FLOATS
from layercut.files.json_values import write_json
from layercut.files.writing import appearing
from layercut.models import checkpoints, loading
from layercut.pipeline.handover import describe_, describe_run_, destination, result_of, upload
from layercut.pipeline.provenance import check_finished, is_run
from layercut.progress import say
from layercut.registries import exporters
from layercut.report.model_card import Made, from_folder, of_run, perplexity_again
from layercut.report.page import write_report
from layercut.report.run_facts import model_key
from layercut.report.stage_lines import describe_export, describe_gguf_check
from layercut.report.verdicts import broken


def export(target: str, config: ExportConfig) -> Path:
    """Write a finished run's model, or a checkpoint, in the format that is asked for.

    It takes its name only when the exporter has ended well, and GGUF and safetensors are read back, compared and
    measured again by then. Of a GGUF file the run's `gguf.json` holds what was found, the tensor types really written,
    and whether the file is broken; the report shows it.
    """
    run, exporter, repo_id = Path(target), exporters.get(config.format), destination(config.hub)
    is_a_run = is_run(run)
    if is_a_run:
        check_finished(run, "export")
    source = ExportSource(run / "model", run) if is_a_run else ExportSource(run)
    _say_who_misreads(source.model, config)
    with appearing(config.out, force=config.force, within=True, source=run) as work:
        written = work / config.out.name
        facts = exporter(source, written, config) or {}
        if not written.exists():
            raise ConfigError(f"the exporter {config.format} wrote nothing to {written.name}", "correct the exporter")
        facts |= {"file": config.out.name, "bytes": _bytes_of(written)}
    _say(config, facts)
    if is_a_run and config.format == "gguf":
        _keep(run, facts)
    if config.format in exporters.own:
        describe_(config.out, _made(target, source.run, config, facts), source.run)
    if repo_id:
        upload(config.out, repo_id, private=config.hub.private)
    return config.out


def describe_result_(run: Path) -> None:
    """Write what goes with a finished run's result; of a .gguf file also gguf.json, for the report."""
    file = result_of(run)
    if file.suffix != ".gguf":
        describe_run_(run)
        return
    facts = dict(checkpoints.read_json(run / "export.json")["gguf"])
    _keep(run, facts)
    describe_(file, _made(str(run), run, ExportConfig(out=file), facts), run)


def _made(target: str, run: Path | None, config: ExportConfig, facts: dict[str, Any]) -> Made:
    """What the card of the written file or folder says."""
    plain = of_run(run) if run else from_folder(Path(target))
    if config.format != "gguf":
        return replace(plain, done="Float weights as a checkpoint folder.", number_format="", packed=False)
    types = ", ".join(f"{kind} ({count})" for kind, count in facts["tensor_types"].items())
    again, figures = facts["again"], []
    value = again["perplexity"]["file"] or (again["llama_cpp"] or {}).get("perplexity")
    if run and value:
        figures = [perplexity_again(run, value, again["tokens"])]
    kind = facts["kind"].upper()
    if facts["kind"] in AS_THEY_CAME:
        kind = next((name for name in facts["tensor_types"] if name not in FLOATS), "F32")
    number_format = "" if kind in FLOATS else kind
    done = f"As a GGUF file; tensors: {types}."
    return replace(plain, done=done, number_format=number_format, packed=False, gguf=config.out.name, figures=figures)


def _say_who_misreads(model: Path, config: ExportConfig) -> None:
    """Warn of consumers that would misread the model in this format; a package's own format is its own business."""
    if config.format in exporters.own:
        stock = loading.load_config(checkpoints.resolve(str(model)))
        written: engines.Written = "gguf" if config.format == "gguf" else "float"
        engines.check_cut(stock, [], consumer_names(config.consumers), written)
        engines.warn_misread("export", engines.readings(stock, [], written))


def _bytes_of(path: Path) -> int:
    """Of a file, or of all in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _say(config: ExportConfig, facts: dict[str, Any]) -> None:
    """Lines about what was written; of a package's exporter each fact on a line."""
    if config.format == "gguf":
        types = ", ".join(f"{kind} {count}" for kind, count in facts["tensor_types"].items())
        say("export", f"{facts['bytes']:,} bytes; tensors: {types}")
        for words in describe_gguf_check(facts):
            say("check", words)
    elif config.format == "safetensors":
        say("export", describe_export(facts, config.out))
    else:
        for key, value in facts.items():
            say("export", f"{key}: {value}")


def _keep(run: Path, facts: dict[str, Any]) -> None:
    """gguf.json in the run's folder, and the report again."""
    summary = checkpoints.read_json(run / "summary.json")
    facts["broken"] = broken(_with_file(summary, facts["again"]))
    if facts["broken"]:
        say("warning", facts["broken"])
    write_json(run / "gguf.json", facts | {"run": model_key(run)})
    write_report(run)


def _with_file(summary: dict[str, Any], again: dict[str, Any]) -> dict[str, Any]:
    """The summary of a run with the GGUF file in the place of the quantized model.

    It was measured on fewer tokens than the run's own: taken is the run's last perplexity before quantization, times
    what writing the file did to it on those.
    """
    figures, measured = summary["perplexity"] | {"quantized": None}, again["perplexity"]
    written = measured["file"] or (again["llama_cpp"] or {}).get("perplexity")
    last = [figures[name] for name in ("cut", "folded", "tuned") if figures[name] is not None]
    if last and written:
        figures["quantized"] = last[-1] * written / measured["model"]
    return summary | {"perplexity": figures}
