"""A finished run, or a checkpoint folder, as a GGUF file: written, read back by those who will use it, measured again.

Beside `pipeline.compress`, over the same rooms, like `cli/commands.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from layercut.config import ExportConfig
from layercut.data.blocks import load_blocks, stored_blocks
from layercut.errors import ModelError, RunError
from layercut.evaluation import perplexity
from layercut.export.checkpoint import CHECK_TOKENS, text_to_check
from layercut.export.gguf import (
    CONVERTED,
    PLAIN,
    architecture_of,
    convert,
    gguf_tensors,
    quantize_by_llama_cpp,
    requantized,
    require_llama_cpp,
    tensor_types,
)
from layercut.export.gguf_check import (
    by_llama_cpp,
    compare_weights,
    llama_cpp_installed,
    read_by_transformers,
    readable,
    unlike_the_folder,
)
from layercut.files.json_values import write_json
from layercut.models import checkpoints, loading
from layercut.models import llama_cpp_rules as rules
from layercut.pipeline.provenance import is_run
from layercut.progress import bar, say
from layercut.report.lines import describe_gguf_check
from layercut.report.page import write_report
from layercut.report.verdicts import broken
from layercut.segments import Segment
from layercut.surgery import cut_gguf, cut_segment_
from layercut.surgery.companions import appearing

WINDOW = 256
"""Tokens a row of the text that a GGUF file is measured on where no run brings its own."""


def export(target: str, config: ExportConfig) -> Path:
    """Write a finished run's model, or a checkpoint folder, as a GGUF file; returns the file.

    A run that began from a .gguf file keeps the bytes of all it did not heal. The file is read back, compared and
    measured again before it takes its name. In a run's folder, `gguf.json` tells what was seen, the tensor types really
    written, and whether the file is broken; the report takes it over.
    """
    run, kind = Path(target), config.gguf_type
    if kind not in PLAIN:
        require_llama_cpp()
    of_run = is_run(run)
    if of_run and not (run / "summary.json").is_file():
        raise RunError(f"the run in {target} is not finished", "give its compress command again, then export")
    summary = checkpoints.read_json(run / "summary.json") if of_run else {}
    with appearing(config.out, force=config.force) as work:
        file = work / config.out.name
        if of_run and summary["model"].endswith(".gguf"):
            facts = _healed_gguf(run, summary["model"], file, kind)
        else:
            folder, text = (run / "model", _text_of(run)) if of_run else (run, None)
            facts = _converted(folder, file, config, text)
        facts |= {"file": config.out.name, "bytes": file.stat().st_size, "tensor_types": tensor_types(file)}
    types = ", ".join(f"{name} {count}" for name, count in facts["tensor_types"].items())
    say("export", f"{facts['bytes']:,} bytes; tensors: {types}")
    for words in describe_gguf_check(facts):
        say("check", words)
    if of_run:
        facts["broken"] = broken(_with_file(summary, facts["again"]))
        if facts["broken"]:
            say("warning", facts["broken"])
        write_json(run / "gguf.json", facts | {"run": summary["config_hash"]})
        write_report(run)
    return config.out


def _text_of(run: Path) -> torch.Tensor:
    """The first of a run's evaluation tokens [N, T]."""
    return text_to_check(stored_blocks(run, "evaluation"))


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


def _healed_gguf(run: Path, source: str, file: Path, kind: str) -> dict[str, Any]:
    """The source file without the run's segments, with what healing changed written anew."""
    checkpoint = checkpoints.resolve(source)
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    segments = [Segment(*bounds) for bounds in checkpoints.read_json(run / "cut.json")["segments"]]
    healed = _healed_weights(run)
    loaded = loading.load(checkpoint, dtype=settings["dtype"], device="cpu")
    student = loaded.model
    cut_segment_(student, segments)
    loading.replace_parameters_(student, healed)
    plain = file if kind in PLAIN else file.with_name("plain.gguf")
    tensors = gguf_tensors(healed, student.config, architecture_of(checkpoint.file), kind if kind in PLAIN else "f16")
    cut_gguf(checkpoint.file, segments, plain, replaced=tensors)
    rounded = {name: ggml.name.lower() for name, (_, ggml) in zip(healed, tensors.values(), strict=True)}
    if unlike_the_folder(plain, student.config) is not None:
        raise ModelError(f"{plain.name} gives llama.cpp other sliding layers than the model has", "report this fault")
    read = read_by_transformers(plain, student.config)
    errors = compare_weights(plain.name, read, student, rounded)
    if plain != file:
        quantize_by_llama_cpp(plain, file, kind)
        read = read_by_transformers(file, student.config)
        errors = compare_weights(file.name, read, student, _matrices(student, kind))
    with bar("measuring again", None):
        again = _measure_again(file, student, read, loaded.tokenizer, _text_of(run))
    return {"healed": sorted(healed), "errors": errors, "again": again}


def _healed_weights(run: Path) -> dict[str, torch.Tensor]:
    """What fold and tuning changed; quantization is not among it, a GGUF file has its own."""
    heal, fold = checkpoints.read_json(run / "heal.json"), checkpoints.read_json(run / "fold.json")
    if heal["tuning"]:
        return load_file(run / "tuned.safetensors")
    return load_file(run / "folded.safetensors") if fold["changed"] else {}


def _converted(folder: Path, file: Path, config: ExportConfig, text: torch.Tensor | None) -> dict[str, Any]:
    """A checkpoint folder through llama.cpp's converter, then where asked to fewer bits.

    text: tokens [N, T] to measure on; Python's own documentation where none are given.
    """
    kind = config.gguf_type
    checkpoints.check_folder(folder)
    if "quantization_config" in checkpoints.read_json(folder / "config.json"):
        raise ModelError(
            f"{folder} is quantized already; a GGUF file is made from float weights",
            "compress without --bits, and let --gguf-type quantize",
        )
    loaded = loading.load(checkpoints.resolve(str(folder)), device="cpu")
    plain = file if kind in CONVERTED else file.with_name("plain.gguf")
    with bar("converting", None):
        convert(folder, plain, kind if kind in CONVERTED else "f32", config.converter)
        _say_what_slides(plain, loaded.model.config)
        if kind == "q4_0":
            cut_gguf(plain, [], file, replaced=requantized(plain, kind))
        elif plain != file:
            quantize_by_llama_cpp(plain, file, kind)
    name = architecture_of(file)
    if not rules.known(name) and not llama_cpp_installed():
        raise ModelError(
            f"layercut does not know how llama.cpp tells the layers of {name!r} apart, and llama.cpp is not installed",
            'pip install "layercut[llamacpp]"',
        )
    read = read_by_transformers(file, loaded.model.config) if readable(name) else None
    errors = {} if read is None else compare_weights(file.name, read, loaded.model, _matrices(loaded.model, kind))
    if text is None:
        positions = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None) or WINDOW
        window = min(WINDOW, positions)
        text = load_blocks(
            "python-docs", loaded.tokenizer, tokens=CHECK_TOKENS, window=window, seed=0, order="as written"
        ).tokens
    with bar("measuring again", None):
        if plain != file and llama_cpp_installed():  # what quantization costs would hide a small difference
            by_llama_cpp(plain, loaded.model, loaded.tokenizer, text)
        again = _measure_again(file, loaded.model, read, loaded.tokenizer, text, judge=plain == file)
    return {"errors": errors, "again": again}


def _say_what_slides(file: Path, config: Any) -> None:
    """Write into a converted file which layers slide, where llama.cpp would take others.

    ModelError: it does not read that.
    """
    full = unlike_the_folder(file, config)
    if full is None:
        return
    spelled = file.with_name("spelled.gguf")
    cut_gguf(file, [], spelled, full=full)
    spelled.replace(file)
    say("note", f"which layers slide is written as {rules.PATTERN}, which llama.cpp reads from {rules.NEEDS_BUILD} on")


def _matrices(model: Any, kind: str) -> dict[str, str]:
    """The type each parameter may have been rounded to: matrices to that asked for, vectors stay in float32."""
    return {name: kind if p.dim() >= 2 else "f32" for name, p in model.named_parameters()}


def _measure_again(
    file: Path, model: Any, read: Any | None, tokenizer: Any, tokens: torch.Tensor, *, judge: bool = True
) -> dict[str, Any]:
    """Perplexity on tokens [N, T] of `model`, of the file as transformers `read` it, and of the file in llama.cpp.

    read: None where transformers does not know the architecture; llama.cpp is then held against `model`, and refused
    for it unless `judge` is False. What was not measured is None. ModelError: llama.cpp refuses the file, or computes
    something else.
    """
    found = {"model": perplexity(model, tokens), "file": None if read is None else perplexity(read, tokens)}
    theirs = None
    if llama_cpp_installed():
        reference = model if read is None else read
        theirs = by_llama_cpp(file, reference, tokenizer, tokens, judge=judge or read is not None)
    return {"tokens": tokens.numel(), "window": tokens.shape[1], "perplexity": found, "llama_cpp": theirs}
