"""Exporters: the file formats of `layercut export --format`, and layercut's own two, GGUF and safetensors.

An exporter is a function:

    @layercut.exporters.register("mypackage-npz")
    def npz(source, out, options):
        model = AutoModelForCausalLM.from_pretrained(source.model)
        numpy.savez(out, **{name: weight.numpy() for name, weight in model.state_dict().items()})
        return {"weights": len(model.state_dict())}

    layercut export RUN --format mypackage-npz --out small.npz

A GGUF file is written in one of three ways. A run that began from a .gguf file gives one again: the bytes of all that
was not healed stay (`write_cut`, `check_cut`). A .gguf file that is not cut takes other number formats
(`write_requantized`). A checkpoint folder goes through llama.cpp's converter (`write_converted`). All are read back and
measured again, against the model that the file was made from: another reading of the same file would share its faults.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from layercut.config.commands import ExportConfig
from layercut.data.blocks import load_blocks, stored_blocks
from layercut.errors import ModelError, RunError
from layercut.evaluation import perplexity
from layercut.export.checkpoint import CHECK_TOKENS, save, text_to_check
from layercut.export.gguf_check import (
    by_llama_cpp,
    compare_weights,
    perplexity_by_llama_cpp,
    read_by_transformers,
    readable,
    unlike_the_folder,
)
from layercut.export.gguf_tensors import (
    CONVERTED,
    PLAIN,
    architecture_of,
    convert,
    gguf_tensors,
    importance,
    llama_cpp_installed,
    possible_names,
    quantize_file,
    requantized,
    require_llama_cpp,
    stored_types,
    tensor_types,
)
from layercut.files import read_json
from layercut.models import checkpoints, decoder_stack, loading
from layercut.models import llama_cpp_rules as rules
from layercut.models.gguf_header import read_header
from layercut.models.memory import memory_limit
from layercut.models.runner import DecoderRunner
from layercut.progress import bar, say
from layercut.quantization.calibration import each_with_hessian
from layercut.segments import Segment
from layercut.surgery import cut_gguf, cut_segment_

WINDOW = 256  # tokens a row of the text that a GGUF file is measured on where no run brings its own
IMPORTANCE_TOKENS = 16384  # calibration tokens that rounding measures, at most
FLOATS = {"F32", "F16", "BF16"}
FINE = (*CONVERTED, "q8_0")
"""GGML types that are so fine that neither importance nor GPTQ changes anything worth measuring."""
SAME, FINER = "same", "finer"
"""--gguf-type: healed tensors in the number format that they came in, or in the next finer one. Those that were left
alone lie on the grid of theirs; healed ones do not, and lose most."""
AS_THEY_CAME = (SAME, FINER)
NEXT_FINER = {
    "q4_0": "q5_0", "q4_1": "q5_1", "q5_0": "q8_0", "q5_1": "q8_0", "iq4_nl": "q5_0", "q2_k": "q3_k", "q3_k": "q4_k",
    "q4_k": "q5_k", "q5_k": "q6_k", "q6_k": "q8_0", "iq4_xs": "q5_k", "iq3_s": "q4_k", "iq3_xxs": "q4_k",
    "iq2_s": "q3_k", "iq2_xs": "q3_k", "iq2_xxs": "q3_k", "iq1_m": "iq2_xs", "iq1_s": "iq2_xs",
}  # fmt: skip
"""By GGML type: what healed tensors that came in it are written in; of others, which are fine enough, the same."""
LARGEST_JUMP = ((8.0, 1.05), (5.0, 1.3), (4.0, 2.0), (0.0, 10.0))
"""Bits a weight; how many times the model's perplexity a file may have whose coarsest tensors have at least so many.

Seen on SmolLM2-135M, which suffers more than larger models: Q8_0 1.01, Q4_K_M 1.05, Q4_0 1.4 times.
Beyond these the file is not what rounding makes of the model."""


@dataclass(frozen=True)
class ExportSource:
    """What is to be exported."""

    model: Path  # a checkpoint folder or a .gguf file; of a finished run what is in its folder
    run: Path | None = None  # the folder of the finished run

    @property
    def came(self) -> checkpoints.Checkpoint | None:
        """The .gguf file that this began from, or is; None where it is no such file."""
        named = read_json(self.run / "summary.json")["model"] if self.run else str(self.model)
        if not checkpoints.names_a_gguf(named):
            return None
        found = checkpoints.resolve(named)
        return found if found.gguf else None

    @property
    def text(self) -> torch.Tensor | None:
        """Token ids [N, T] to measure on: the first of the run's evaluation text; None without a run."""
        return text_to_check(stored_blocks(self.run, "evaluation")) if self.run else None


Exporter = Callable[[ExportSource, Path, ExportConfig], dict[str, Any]]
"""(source, out, options) -> facts, fit for JSON, which are printed.

out: a path that does not exist yet, of the name asked for, on which the exporter writes a file or a folder; it is moved
to its place when the exporter has returned, and removed where it raises. Raise a LayercutError with a hint for what the
user can correct."""


def gguf(source: ExportSource, out: Path, options: ExportConfig) -> dict[str, Any]:
    """A GGUF file for llama.cpp, read back and compared; a run that began from one keeps the bytes it did not heal."""
    came, text = source.came, source.text
    kind: str | None = options.gguf_type
    calibration = stored_blocks(source.run, "calibration") if source.run else None
    if kind is not None and is_mixture(kind):
        require_llama_cpp()
    if source.run is not None and came is not None:
        assert text is not None
        written = read_json(source.run / "quantize.json").get("gguf") or {}
        # as in the run's own .gguf file; where it has none, as those of others
        kind = kind or (written["kind"] if written.get("kind") in AS_THEY_CAME else FINER)
        cut = cut_of_run(source.run, came)
        facts = write_cut(cut, out, kind, cut.student().model, calibration)
        facts |= check_cut(cut, out, text)
    elif came is not None:
        facts = write_requantized(came, out, kind or SAME)
    else:
        name = None
        if source.run is not None:
            summary = read_json(source.run / "summary.json")
            layers = summary["layers"]
            name = f"{Path(summary['model']).name} ({layers['after']} of {layers['before']} layers)"
        facts = write_converted(source.model, out, options, text, calibration, name)
    return facts | {"tensor_types": tensor_types(out)}


def safetensors(source: ExportSource, out: Path, options: ExportConfig) -> dict[str, Any]:
    """A stock checkpoint folder of float weights, of a .gguf file or of packed ones, verified by a fresh process."""
    if source.run and (came := source.came):  # its own healed weights, not what a GGUF file rounds them to
        loaded = cut_of_run(source.run, came).student()
        decoder_stack.convert_parameters_(loaded.model, torch.bfloat16)
        loaded.model.stored_dtype = torch.bfloat16
    else:
        loaded = loading.load(checkpoints.resolve(str(source.model)))
    return {"check": save(loaded.model, loaded.tokenizer, out, text=source.text).check}


# --- a .gguf file without some layers ---


@dataclass(frozen=True, kw_only=True)
class CutGguf:
    """A .gguf file without some layers, and what healing changed of the others."""

    checkpoint: checkpoints.Checkpoint  # the source file
    segments: list[Segment]
    healed: Mapping[str, torch.Tensor]  # by parameter name, of the model after the cut

    def student(self) -> loading.LanguageModel:
        """The model that the file should be, in float32."""
        loaded = loading.load(self.checkpoint, dtype="float32", device="cpu")
        if self.segments:
            cut_segment_(loaded.model, self.segments)
        decoder_stack.replace_parameters_(loaded.model, {name: weight.float() for name, weight in self.healed.items()})
        return loaded

    def write(
        self, out: Path, config: Any, kind_of: Any = "f32", hessians: Iterable[tuple[str, torch.Tensor]] = ()
    ) -> None:
        """The kept bytes, and what healing changed, as `gguf_tensors` has it."""
        how, left = (config, architecture_of(self.checkpoint.file), kind_of), {**self.healed}
        tensors = dict[str, tuple[Any, Any]]()
        for name, hessian in hessians:  # one at a time: a large model's are gigabytes
            tensors |= gguf_tensors({name: left.pop(name)}, *how, {name: hessian})
        tensors |= gguf_tensors(left, *how)
        cut_gguf(self.checkpoint.file, self.segments, out, replaced=tensors, as_loaded=True)

    def types(self) -> dict[str, str]:
        """The GGML types of the tensors that stay, as they came."""
        return stored_types(self.checkpoint.file, self.segments, as_loaded=True)


def cut_of_run(run: Path, came: checkpoints.Checkpoint) -> CutGguf:
    """What a finished run removed from a .gguf file, and what it healed; not its bits, a GGUF file has its own."""
    if came.changed_since(run / checkpoints.DIGESTS):
        words = f"{came.file} is another file than the one that {run} was made from"
        raise RunError(words, "put that one back, or compress this one")
    heal, fold = read_json(run / "heal.json"), read_json(run / "fold.json")
    changed = "tuned" if heal["tuning"] else "folded" if fold["changed"] else None
    return CutGguf(
        checkpoint=came,
        segments=[Segment(*bounds) for bounds in read_json(run / "cut.json")["segments"]],
        healed=load_file(run / f"{changed}.safetensors") if changed else {},
    )


def healed_type(kind: str, came: str) -> str:
    """The number format of a healed tensor."""
    return NEXT_FINER.get(came, came) if kind == FINER else came if kind == SAME else kind


def is_mixture(kind: str) -> bool:
    """Whether a --gguf-type is one of llama.cpp's mixtures, which are of all matrices and not of healed ones alone."""
    return kind not in (*AS_THEY_CAME, *PLAIN)


@torch.no_grad()
def write_cut(source: CutGguf, file: Path, kind: str, student: Any, tokens: torch.Tensor | None) -> dict[str, Any]:
    """The source file without the segments, with what healing changed replaced.

    What healing changed is rounded by GPTQ; a mixture, which is of all weights, by llama.cpp with an importance matrix.
    """
    plain = file.with_name("unrounded.gguf")
    plain.unlink(missing_ok=True)  # of a command that was stopped
    if is_mixture(kind):
        columns = _columns(student, tokens)
        try:
            source.write(plain, student.config)
            with bar(f"quantizing to {kind}", None):
                quantize_file(plain, file, kind, _in_file(plain, student, columns))
        finally:
            plain.unlink(missing_ok=True)
        return {"kind": kind, "healed": sorted(source.healed), "importance": len(columns)}
    types, names = source.types(), possible_names(student, architecture_of(source.checkpoint.file))
    coarse = {each for each in source.healed if healed_type(kind, types.get(names[each] or "", "f32")) not in FINE}
    read: dict[int, list[str]] = {}
    for i, name, _ in decoder_stack.linear_by_layer(student) if tokens is not None else ():
        if f"{name}.weight" in coarse:
            read.setdefault(i, []).append(name)
    hessians = () if tokens is None or not read else _hessians(student, _some(tokens), read)
    source.write(file, student.config, lambda name: healed_type(kind, types[name]), hessians)
    return {"kind": kind, "healed": sorted(source.healed), "importance": sum(map(len, read.values()))}


def _hessians(
    model: Any, tokens: torch.Tensor, read: Mapping[int, Sequence[str]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """H of what these modules read, by parameter; none of an expert to which no token was sent."""
    names = {name for each in read.values() for name in each}
    with memory_limit(), bar("rounding", max(read) + 1) as advance:
        for _, name, hessian in each_with_hessian(DecoderRunner(model), tokens, read, names, advance):
            if hessian is not None and hessian.any():
                yield f"{name}.weight", hessian


def _some(tokens: torch.Tensor) -> torch.Tensor:
    """Rows of as many tokens as rounding measures."""
    return tokens[: max(1, IMPORTANCE_TOKENS // tokens.shape[1])]


def _columns(model: Any, tokens: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Importance of the columns of matrices by parameter name; none without tokens."""
    return {} if tokens is None else importance(model, _some(tokens))


def _in_file(plain: Path, model: Any, columns: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The importance of columns by the matrices' names in a file, of those that are one tensor there."""
    names = possible_names(model, architecture_of(plain)) if columns else {}
    return {name: columns[one].numpy() for one, name in names.items() if name and one in columns}


def check_cut(source: CutGguf, file: Path, text: torch.Tensor) -> dict[str, Any]:
    """Hold a file that `write_cut` wrote against the model that it should be."""
    loaded, architecture = source.student(), architecture_of(file)
    student = loaded.model
    if unlike_the_folder(file, student.config) is not None:
        raise ModelError(f"{file.name} gives llama.cpp other sliding layers than the model has", "report this fault")
    read = read_by_transformers(file, student.config)
    kept, types = source.types(), _types_of(student, file)
    same = {name: kept == stored_types(file) if theirs is None else types[name] == kept.get(theirs)
            for name, theirs in possible_names(student, architecture).items()}  # fmt: skip
    again = {name: types[name] for name in types if name in source.healed or not same[name]}
    errors = compare_weights(file.name, read, student, again)
    if {kind.upper() for kind in again.values()} - FLOATS and llama_cpp_installed():
        with tempfile.TemporaryDirectory() as folder, bar("comparing before rounding", None):
            plain = Path(folder) / "unrounded.gguf"
            source.write(plain, student.config)
            by_llama_cpp(plain, student, loaded.tokenizer, text[:1])  # rounding would hide a small difference
    measured = measure_again(file, student, read, loaded.tokenizer, text, source=source.checkpoint.file)
    return {"errors": errors, "again": measured}


# --- a whole model ---


def write_requantized(checkpoint: checkpoints.Checkpoint, file: Path, kind: str) -> dict[str, Any]:
    """A .gguf file with its matrices in another number format."""
    if kind in AS_THEY_CAME:
        words = f"{checkpoint.name} was not healed: its tensors stay in their number formats"
        raise ModelError(words, "give another --gguf-type")
    loaded = loading.load(checkpoint, dtype="float32", device="cpu")
    text = _some_text(loaded)
    came = checkpoint.file
    if read_header(came).finer_twin:
        came = file.with_name("unrounded.gguf")
        cut_gguf(checkpoint.file, [], came, as_loaded=True)
    how = write_rounded(came, file, kind, loaded.model, text, None)
    if came != checkpoint.file:
        came.unlink()
    return {"kind": kind} | how | _read_and_measured(file, loaded, text, checkpoint.file)


def write_converted(
    folder: Path,
    file: Path,
    config: ExportConfig,
    text: torch.Tensor | None = None,
    calibration: torch.Tensor | None = None,
    name: str | None = None,
) -> dict[str, Any]:
    """A checkpoint folder through llama.cpp's converter, then where asked to fewer bits.

    text, calibration: token ids [N, T] to measure on, and to measure the importance of columns on.
    """
    kind = config.gguf_type or "q8_0"
    checkpoints.check_folder(folder)
    if kind in AS_THEY_CAME:
        why, hint = "came in no number format of GGUF", "give another --gguf-type"
        raise ModelError(f"{folder} {why}; a GGUF file is made from float weights", hint)
    if "quantization_config" in read_json(folder / "config.json"):
        why, hint = "is quantized already", "compress without --bits, and let --gguf-type quantize"
        raise ModelError(f"{folder} {why}; a GGUF file is made from float weights", hint)
    # in float32: what llama.cpp computes of a bfloat16 folder is nearer to that than the folder's own dtype comes
    loaded = loading.load(checkpoints.resolve(str(folder)), device="cpu", dtype="float32")
    text = _some_text(loaded) if text is None else text
    plain = file if kind in CONVERTED else file.with_name("unrounded.gguf")
    with bar("converting", None):
        convert(folder, plain, kind if kind in CONVERTED else "f32", config.converter, name)
        if (full := unlike_the_folder(plain, loaded.model.config)) is not None:  # which layers slide is written into it
            cut_gguf(plain, [], spelled := file.with_name("spelled.gguf"), full=full)
            spelled.replace(plain)
            note = f"which layers slide is written as {rules.PATTERN}, which llama.cpp reads"
            say("note", f"{note} from {rules.NEEDS_BUILD} on")
    if not rules.known(architecture := architecture_of(plain)) and not llama_cpp_installed():
        words = f"llama.cpp is missing, and layercut does not know how it distinguishes the layers of {architecture!r}"
        raise ModelError(words, 'pip install "layercut[gguf]"')
    how: dict[str, Any] = {"importance": 0}
    if plain != file:
        if llama_cpp_installed():  # what rounding costs would hide a small difference
            with bar("comparing before rounding", None):
                by_llama_cpp(plain, loaded.model, loaded.tokenizer, text[:1])
        how = write_rounded(plain, file, kind, loaded.model, text, calibration)
        plain.unlink()
    return {"kind": kind} | how | _read_and_measured(file, loaded, text)


def write_rounded(
    plain: Path, file: Path, kind: str, model: Any, text: torch.Tensor, calibration: torch.Tensor | None
) -> dict[str, Any]:
    """A GGUF file with all its matrices in another number format."""
    weighed = kind not in PLAIN or (kind not in FINE and calibration is not None and llama_cpp_installed())
    columns = _columns(model, text if calibration is None else calibration) if weighed else {}
    named = _in_file(plain, model, columns)
    if kind in PLAIN:
        cut_gguf(plain, [], file, replaced=requantized(plain, kind, named))
    else:
        with bar(f"quantizing to {kind}", None):
            quantize_file(plain, file, kind, named)
    return {"importance": len(columns)}


def _some_text(loaded: Any) -> torch.Tensor:
    """Token ids [N, T] of Python's own documentation."""
    window = min(WINDOW, decoder_stack.positions(loaded.model.config) or WINDOW)
    return load_blocks(
        "python-docs", loaded.tokenizer, tokens=CHECK_TOKENS, window=window, seed=0, order="as written"
    ).tokens


# --- measured again ---


def _read_and_measured(file: Path, loaded: Any, text: torch.Tensor, source: Path | None = None) -> dict[str, Any]:
    """Compare a file with the model that it was made from. source: the .gguf file it was made from."""
    model = loaded.model
    read = read_by_transformers(file, model.config) if readable(architecture_of(file)) else None
    errors = {} if read is None else compare_weights(file.name, read, model, _types_of(model, file))
    return {"errors": errors, "again": measure_again(file, model, read, loaded.tokenizer, text, source=source)}


def _types_of(model: Any, file: Path) -> dict[str, str]:
    """The GGML type, in lower case, that each parameter has in a file; of those that llama.cpp parts, the coarsest."""
    types, coarse = stored_types(file), coarsest(file)[1].lower()
    names = possible_names(model, architecture_of(file))
    return {parameter: types.get(name or "", coarse) for parameter, name in names.items()}


def measure_again(
    file: Path, model: Any, read: Any | None, tokenizer: Any, tokens: torch.Tensor, *, source: Path | None = None
) -> dict[str, Any]:
    """Perplexity of the model, and of the file and its source in llama.cpp; where that is missing, in transformers."""
    with bar("measuring again", None):
        before, theirs, installed = perplexity(model, tokens), None, llama_cpp_installed()
        found = {"model": before, "file": None if read is None or installed else perplexity(read, tokens)}
        if installed:
            theirs = by_llama_cpp(file, model, tokenizer, tokens, judge=not set(tensor_types(file)) - FLOATS)
            if source is not None:
                theirs["source_perplexity"] = perplexity_by_llama_cpp(source, tokens)
                theirs["source_bytes"] = source.stat().st_size
    refuse_jump(file, theirs["perplexity"] if theirs else found["file"], before)
    asked = {"tokens": tokens.numel(), "window": tokens.shape[1], "read": read is not None}
    return asked | {"perplexity": found, "llama_cpp": theirs}


def refuse_jump(file: Path, found: float | None, wanted: float) -> None:
    """Refuse a file whose perplexity has risen by more than its number formats explain."""
    bits, kind = coarsest(file)
    most = next(factor for least, factor in LARGEST_JUMP if bits >= least)
    if found is not None and not found <= most * wanted:
        raise ModelError(
            f"{file.name} is not what it was made from: its perplexity is {found:.4g}, {found / wanted:.2f} times that "
            f"of the model, {wanted:.4g}; {kind} explains up to {most:g} times",
            "take a --gguf-type of more bits, or the checkpoint folder",
        )


def coarsest(file: Path) -> tuple[float, str]:
    """Bits a weight of the coarsest type among a file's tensors, and that type's name."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    sizes = {kind: GGML_QUANT_SIZES[GGMLQuantizationType[kind]] for kind in tensor_types(file)}
    return min((8 * size / block, kind) for kind, (block, size) in sizes.items())
