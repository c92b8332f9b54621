"""Claim: scales and norms that are trained after rounding bring a quantized model nearer to what was rounded.

    python research/tune_quantized.py --data C4 --texts wiki=WIKI.txt c4=HELDOUT.txt \
        --settings "bits=4" "bits=4 train=scales" "bits=3 embeddings=3 group=96 train=rounding"
    python research/tune_quantized.py …      # goes on; rows that are done are kept

A setting is `bits`, `group` (columns that share a scale), `quantizer`,
`embeddings` (their bits; 16 where not given), and what is trained after rounding: `train` none, scales or rounding (the
integers too), on `tokens`, `batch` of them a step, at `rate` (a share of each unit; the default where not given), with
a share `mix` of the next token's loss, on other texts `beside` the first ("A+B"), of each of which as many rows are,
and a share `tests` of generated tests among them; rows are then done as a run does them, half of all text in long ones.
It is rounded on --tokens, or on `calibration` tokens: those, and as many more of the ones to train on as it takes; and
on `rounding_tests` rows of tests for each of these rows (a run: 0.25).
"removed=16:19" takes layers out first, and folds.
"quantizer=auto-round iterations=50" has the layers rounded by auto-round (peer_auto_round.py) on the first `tokens` of
the same text, embeddings as here, with `--auto-round PYTHON` of an environment that has it; its bytes are those of our
checkpoint on the same grid. "bits=auto size=86MB" chooses the bits of each matrix for a size, embeddings and head too
(`embeddings` is not read then), and is to be compared with one width of that size. The model is the dithered control
(control.py), with all layers unless some are `removed`. Perplexity of the same tokens for all, beside the dense one's.
"""

from __future__ import annotations

import copy
import math
import resource
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from common import RowsDone, arguments, blocks, finish, named, open_model
from control import dither_
from layercut import evaluation
from layercut.config import NEAR_ENOUGH, QuantizeConfig, TuneSettings
from layercut.data.probes import probe_rows
from layercut.data.sources import TESTS, split_mix
from layercut.files import parse_bytes
from layercut.healing import fold_
from layercut.healing.endpoint_tuning import tune_parameters_
from layercut.healing.inputs import Rows
from layercut.models import decoder_stack, loading, memory
from layercut.models.decoder_stack import parameter_bytes
from layercut.models.losses import KL
from layercut.pipeline.resolve_options import LONG_ROW
from layercut.pipeline.stages.quantize import FIRST_TEST, ROWS, TOWARDS
from layercut.pipeline.stages.text import Treatment
from layercut.progress import say
from layercut.quantization import Quantized, quantize_
from layercut.quantization.trainable import Trainable
from layercut.segments import Segment
from layercut.surgery import cut

PLAIN = {"bits": 16, "group": 0, "quantizer": "gptq", "embeddings": 16, "train": "none", "tokens": 0}
PEER = "auto-round"
LATER = {
    "removed": str, "size": str, "rate": float, "batch": int, "iterations": int, "mix": float,
    "beside": str, "calibration": int, "tests": float, "rounding_tests": float,
}  # fmt: skip
"""Options of single settings, which the rows of others do not name."""
TRAINING = ("train", "tokens", "batch", "rate", "mix", "tests")
"""Options of what is done after rounding."""
LAST: dict[str, Any] = {}
"""What was rounded last: see `once_rounded`."""


def parsed(text: str, tokens: int) -> dict[str, Any]:
    """A setting from "bits=4 train=scales"; tokens: how many it trains on unless it says so."""
    given = dict(option.split("=") for option in text.split())
    types: dict[str, Any] = {name: type(value) for name, value in PLAIN.items()} | LATER
    if unknown := given.keys() - types:
        raise SystemExit(f"error: no setting is called {', '.join(unknown)}\nhint: allowed are {', '.join(types)}")
    trains = given.get("train", "none") != "none" or given.get("quantizer") == PEER
    if "removed" in given and ("bits" not in given or given.get("quantizer") == PEER):
        raise SystemExit(f"error: {text!r} removes layers and rounds nothing of ours\nhint: give bits, and no {PEER}")
    if ("size" in given) != (given.get("bits") == "auto"):
        raise SystemExit(f"error: {text!r} has one of bits=auto and size=\nhint: bits=auto size=86MB")
    typed = {name: value if value == "auto" else types[name](value) for name, value in given.items()}
    return PLAIN | {"tokens": tokens if trains else 0} | typed


def quantized(model: loading.LanguageModel, asked: dict[str, Any], text: Text, peer: str) -> dict[str, Any]:
    """The model in fewer bits, trained after that as asked; with what it takes and how the training went."""
    student, found, spent = once_rounded(model.model, asked, text)
    row: dict[str, Any] = {"bytes": found.bytes_after, "of_dense": found.bytes_after / parameter_bytes(model.model)}
    row["quantize_cpu_seconds"] = spent
    if found.mixture:
        row |= {name: found.mixture[name] for name in ("predicted_kl", "mean_bits", "one_width")}
        row["weights_by_bits"] = dict(sorted(Counter(str(weight.bits) for weight in found.weights).items()))
    if asked["quantizer"] == PEER:
        row |= replaced_by_peer_(found.model, model, asked, text.tuning, peer)
    if asked["train"] != "none":
        found, row["tuning"] = trained_(found, student, asked, text)
    return row | {"model": found.model}


def once_rounded(dense: Any, asked: dict[str, Any], text: Text) -> tuple[Any, Quantized, float]:
    """What is rounded, as it was and rounded, and the seconds that took: of settings in turn that differ in their
    training alone those of the first."""
    how = {name: value for name, value in asked.items() if name not in (*TRAINING, "beside")}
    of = how, [tensor.tolist() for tensor in (text.calibration, text.rounding, text.heldout)]
    if LAST.get("of") != of:
        LAST.clear()
        student = without(dense, asked["removed"], text) if "removed" in asked else dense
        begun = time.process_time()
        LAST.update(of=of, student=student, found=rounded(student, asked, text.rounding))
        LAST["seconds"] = time.process_time() - begun
    return LAST["student"], copy.deepcopy(LAST["found"]), LAST["seconds"]


def rounded(student: Any, asked: dict[str, Any], calibration: torch.Tensor) -> Quantized:
    """A model in fewer bits; it shares what is not rounded with the student, which stays as it is."""
    config = QuantizeConfig(
        bits=asked["bits"], quantizer="rtn" if asked["quantizer"] == PEER else asked["quantizer"],
        group_size=asked["group"] or None,
        embedding_bits=asked["embeddings"] if asked["embeddings"] < 16 else None,
    )  # fmt: skip
    target = parse_bytes("size", asked["size"]) if "size" in asked else None
    return quantize_(decoder_stack.share(student), calibration, config, target=target)


def trained_(found: Quantized, student: Any, asked: dict[str, Any], text: Text) -> tuple[Quantized, dict[str, Any]]:
    """What `rounded` made of the student, trained towards it; and how that went."""
    parts = Trainable.of_(found, student if asked["train"] == "rounding" else None)
    rows = slice(max(1, asked["tokens"] // text.tuning.shape[1]))
    objective: Any = KL(mix=asked.get("mix", 0.0))
    settings = TuneSettings(
        objective=objective, learning_rate=asked.get("rate", parts.rate), batch_tokens=asked.get("batch", 1024),
    )  # fmt: skip
    told = tune_parameters_(
        parts.model, student, parts.parameters,
        Rows(tokens=text.tuning[rows], **vars(text.treated.of(lambda each: each[rows]))), heldout=text.heldout,
        settings=settings, rate_from=None if "rate" in asked else parts.rate_from, tolerated=parts.tolerated,
    )  # fmt: skip
    kept = ("learning_rate", "trained_parameters", "state_bytes", "heldout", "best_step", "cpu_seconds", "setbacks")
    return parts.finished_(), {name: getattr(told, name) for name in kept}


def without(dense: Any, removed: str, text: Text) -> Any:
    """A copy that lacks the layers of "12:16,5:7", folded on the calibration tokens."""
    student = cut(dense, [Segment.parse(one) for one in removed.split(",")])
    fold_(student, dense, text.calibration, heldout=text.heldout)
    return student


def replaced_by_peer_(
    small: Any, model: loading.LanguageModel, asked: dict[str, Any], rows: torch.Tensor, peer: str
) -> dict[str, Any]:
    """The decoder's weights as auto-round rounds them, in the place of ours; with its processor time."""
    rows = rows[: asked["tokens"] // rows.shape[1]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.model.save_pretrained(folder / "model")
        model.tokenizer.save_pretrained(folder / "model")
        torch.save(rows, folder / "rows.pt")
        files = [str(folder / each) for each in ("model", "rows.pt", "rounded.safetensors")]
        options = {"bits": asked["bits"], "group-size": asked["group"], "iterations": asked["iterations"]}
        told = [part for key, value in options.items() for part in (f"--{key}", str(value))]
        before = cpu_of_children()
        subprocess.run([peer, str(Path(__file__).with_name("peer_auto_round.py")), *files, *told], check=True)
        rounded = load_file(files[2])
    missing = [n for n, p in small.named_parameters() if p.dim() == 2 and ".layers." in n and n not in rounded]
    assert not missing, f"auto-round left {missing}"
    new: dict[str, torch.Tensor] = {n: torch.nn.Parameter(w.to(small.dtype), False) for n, w in rounded.items()}
    decoder_stack.replace_parameters_(small, new)
    return {"quantize_cpu_seconds": cpu_of_children() - before}


def cpu_of_children() -> float:
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def main() -> None:
    args = arguments(
        __doc__ or "", data="c4", texts=["wiki=wikitext2"], settings=["bits=4", "bits=4 train=scales"], tokens=8192,
        tune_tokens=16384, heldout_tokens=2048, eval_tokens=16384, window=256, tune_window=0, seed=0,
        auto_round=sys.executable,
    )  # fmt: skip
    model = open_model(args.model)
    dither_(model.model)
    memory.reuse_freed()
    reported = {
        name: blocks(model, source, args.eval_tokens, args.window, args.seed, order="as written").tokens
        for name, _, source in (item.partition("=") for item in args.texts)
    }
    facts = {key: getattr(args, key) for key in ("tokens", "heldout_tokens", "eval_tokens", "window", "seed")}
    done = RowsDone(args.out, facts)
    for asked in (PLAIN, *(parsed(setting, args.tune_tokens) for setting in args.settings)):
        row = asked | ({"beside": named(asked["beside"])} if "beside" in asked else {})
        row |= how_rounded(asked)
        others = LATER.keys() - row.keys()  # rows that name these were made by another setting
        if any(row.items() <= each.items() and not others & each.keys() for each in done.rows):
            continue
        whole = asked["bits"] == 16
        found = {"model": model.model} if whole else quantized(model, asked, drawn(model, asked, args), args.auto_round)
        small = found.pop("model")
        found["perplexity"] = {name: evaluation.perplexity(small, tokens) for name, tokens in reported.items()}
        done.add(row | found)
        say(str(asked), f"{found['perplexity']}, {found.get('bytes')} bytes")
    finish(args.out, model, (__doc__ or "").splitlines()[0], done.rows, weights="dithered control", **facts)
    done.partial.unlink(missing_ok=True)


def how_rounded(asked: dict[str, Any]) -> dict[str, str]:
    """What rows of before lack: heads were rounded to nearest, tokens counted alike, scales and codes stayed, cut
    models were trained towards the dense one, and tests in short rows."""
    how = {"towards": TOWARDS} if "removed" in asked and asked["train"] != "none" else {}
    how |= {"rows": ROWS} if "tests" in asked else {}
    if asked["quantizer"] != "gptq":
        return how
    auto = asked["bits"] == "auto"
    head = {"head": "gptq"} if auto or asked["embeddings"] < NEAR_ENOUGH else {}
    small = head or auto or asked["bits"] < NEAR_ENOUGH
    return how | head | ({"scales": "fitted", "codes": "exchanged"} if small else {})


@dataclass(frozen=True)
class Text:
    """Token ids to calibrate on, to judge by and to train on [N, T], other rows each; and how the last are done."""

    calibration: torch.Tensor
    rounding: torch.Tensor
    """These, and the tests that weights are rounded on beside them."""
    heldout: torch.Tensor
    tuning: torch.Tensor
    treated: Treatment


def drawn(model: loading.LanguageModel, asked: dict[str, Any], args: Namespace) -> Text:
    """What a setting is rounded on, judged by and trained on."""
    data = f"{args.data}+{asked['beside']}" if "beside" in asked else args.data
    counts = args.tokens, args.heldout_tokens
    calibration, heldout = blocks(model, data, sum(counts), args.window, args.seed).tokens.split(
        [count // args.window for count in counts]
    )
    share = asked.get("tests", 0.0)
    longest = min(LONG_ROW, asked.get("batch", LONG_ROW))  # a row is no longer than a step
    window = max(longest, args.window) if share else args.tune_window or args.window
    streams = len(split_mix(data)) if window != args.window else 0  # each may have gone a part of such a row more
    before = math.ceil(sum(counts) / (1 - share) / window) + streams
    source = f"{data}+{TESTS}:{share:g}" if share else data
    found = blocks(model, source, args.tune_tokens, window, args.seed, skip=before)
    treated = Treatment.as_drawn(
        found.tokens, found.facts.origins, found.marks,
        short=args.window if share else None,
    ).by_predictions()  # fmt: skip
    text = found.tokens[found.marks.lengths == 0] if found.marks else found.tokens
    spare = text.reshape(-1, args.window)
    more = (asked.get("calibration", args.tokens) - args.tokens) // args.window
    if not 0 <= more <= len(spare):
        got, most = asked["calibration"], args.tokens + spare.numel()
        raise SystemExit(f"error: calibration={got}\nhint: --tokens {args.tokens}, those to train on too: up to {most}")
    calibration = torch.cat([calibration, spare[:more]])
    rounding, count = [calibration], round(asked.get("rounding_tests", 0.0) * len(calibration))
    if count:
        how = {"window": args.window, "family": "tuning", "seed": args.seed, "first": FIRST_TEST}
        made = probe_rows(model.tokenizer, rows=count, **how)
        rounding.append(made.asking())
    return Text(calibration, torch.cat(rounding), heldout, found.tokens, treated)


if __name__ == "__main__":
    main()
