"""Claim: cutoff endpoint tuning heals a cut better than what it is put beside, at equal tokens and at equal time.

    python research/healing.py --data TUNE.txt --report wiki=WIKI.txt web=WEB.txt [--genres books=BOOKS.txt …]
    python research/healing.py …                      # goes on; methods that are done are kept; with other --methods
                                                        # also beside it, on another core, once "endpoints" is done
    python research/healing.py … --again lora full    # these once more
    python research/healing.py … --peer-python PYTHON # "optipfair" too, by that interpreter (peer_optipfair.py)

Every method runs in a process of its own (--only METHOD), with the same calibration, tuning, held-out and reported
tokens, and starts from the folded cut unless it says otherwise. Its learning rate is the best of three on few tokens,
and of more beyond them until the best lies between two others (by the held-out loss of what it trains for, at the end;
OptiPFair's, which trains for a mixture, by held-out KL); variants of a method in start, reach, text or loss take its.
Gap closed: (ln cut - ln healed) / (ln cut - ln dense), of perplexities. Memory: the process's peak while training
above what it held with the weights loaded. Time: CPU seconds of training, all threads, scoring left out, since a
shared machine stretches the seconds on the wall, which stand beside them; give OMP_WAIT_POLICY=passive, or idle
threads count as well. Equal time: held-out KL at the CPU seconds that endpoint tuning takes, read from the curve,
where a slower method is stopped before its rate has come down; for those named by --equal-time also trained anew on
as many tokens as fit these seconds, at most twice the tokens. Writes OUT.json, OUT.md and OUT.svg.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from common import arguments, blocks, open_model
from healers import BASELINES, PASS_TOKENS, judged, patch_, train_
from layercut.config import TuneSettings
from layercut.data.blocks import load_blocks
from layercut.evaluation import perplexity
from layercut.files import write_json, write_text
from layercut.healing import tune_
from layercut.healing.inputs import Rows
from layercut.healing.least_squares import fold_cut_
from layercut.healing.recipe import default_learning_rate, usual_weight
from layercut.healing.tuning_pass import HeldOut, Pair
from layercut.models import decoder_stack, loading
from layercut.models.losses import KL
from layercut.models.memory import reuse_freed
from layercut.models.runner import DecoderRunner, shared_layers
from layercut.pipeline.environment import environment
from layercut.segments import Segment
from layercut.surgery import cut_segment_
from memory import high_water, settled_bytes

matplotlib.use("svg")

MIX = 0.3
TUNED: dict[str, dict[str, Any]] = {
    "endpoints": {},
    "no-fold": {},
    "radius-2": {"radius": 2},
    "next-token": {"objective": "next-token"},
    "hidden": {"objective": "hidden"},
    "mix": {"objective": KL(mix=MIX)},
    "self-text": {},
}
"""Endpoint tuning and its variants, by what differs from the default."""
SAME_RATE = dict.fromkeys(("no-fold", "radius-2", "mix", "self-text"), "endpoints")
SAME_RATE |= dict.fromkeys(("lora-mix", "lora-autograd"), "lora")
"""Variants in start, reach, text or loss, and whose rate they take."""
PEER = "optipfair"
PEER_RATES = (4e-5, 1.5e-4, 4e-4)
"""Its default, and what full fine-tuning tries above that."""
METHODS = ["dense", "cut", "fold", "patch", *TUNED, *BASELINES, PEER]
UNFOLDED = {"cut", "patch", "no-fold", PEER}
GENRES = {"dense", "cut", "fold", "endpoints", "self-text", "lora", "full"}
"""Whose perplexity is taken by genre too."""


def main() -> None:
    args = arguments(
        __doc__, data="python-docstrings", report=["docs=python-docs"], genres=[""], segment="13:19", window=256,
        seed=0, calibration_tokens=16384, tune_tokens=65536, heldout_tokens=2048, rate_tokens=8192,
        eval_tokens=65536, genre_tokens=8192, batch_tokens=TuneSettings.batch_tokens, threads=2, methods=METHODS,
        again=[""], equal_time=[""], peer_python="", only="", cpu_seconds=0.0, rate=0.0,
    )  # fmt: skip
    torch.set_num_threads(args.threads)
    if args.only:
        write_json(child_file(args.out, args.only), measure(args))
    else:
        gather(args)


# --- the parent: one process a method, everything kept that is done ---------------------------------------------


def gather(args: Namespace) -> None:
    apart = {"methods", "again", "equal_time", "peer_python", "only", "cpu_seconds", "rate", "out", "threads", "model"}
    settings = {key: plain_names(value) for key, value in vars(args).items() if key not in apart}
    settings["model"] = Path(args.model).name if args.model else "SmolLM2-135M-Instruct.Q4_1.gguf"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for method in sorted(args.methods, key=METHODS.index):
        rows = kept_rows(args.out, settings)
        if method in rows and method not in args.again:
            continue
        if method == PEER and not args.peer_python:
            print(f"{PEER}: left out; --peer-python PYTHON names an interpreter that has it", flush=True)
            continue
        given = {"only": method, "cpu-seconds": rows.get("endpoints", {}).get("cpu_seconds", 0.0), "out": args.out}
        given["rate"] = rows.get(SAME_RATE.get(method, ""), {}).get("rate", 0.0)
        begun, cpu = time.perf_counter(), children_cpu_seconds()
        extra = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        subprocess.run([sys.executable, *sys.argv, *extra], check=True)
        file = child_file(args.out, method)
        whole = {"whole_seconds": time.perf_counter() - begun, "whole_cpu_seconds": children_cpu_seconds() - cpu}
        rows = kept_rows(args.out, settings) | {method: json.loads(file.read_text()) | whole}  # a lane beside may write
        ordered = sorted(rows.values(), key=lambda row: METHODS.index(row["method"]))
        add_gaps_(ordered)
        claim = __doc__.splitlines()[0] if __doc__ else ""
        environ = environment() | {"command": [Path(sys.argv[0]).name, *plain_names(sys.argv[1:])]}
        write_json(args.out, {"claim": claim, "settings": settings, "rows": ordered, "environment": environ})
        file.unlink()
        print(f"{method}: {whole['whole_seconds']:.0f} s, {whole['whole_cpu_seconds']:.0f} s of CPU", flush=True)
    fold_file(args.out).unlink(missing_ok=True)
    ordered = list(kept_rows(args.out, settings).values())
    write_text(args.out.with_suffix(".md"), table(ordered))
    draw(ordered, args.out.with_suffix(".svg"))
    print(table(ordered))


def kept_rows(out: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What is done already, by method."""
    done: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {"settings": settings, "rows": []}
    if done["settings"] != settings:
        raise SystemExit(f"error: {out} was made with other settings\nhint: give another --out, or remove it")
    return {row["method"]: row for row in done["rows"]}


def children_cpu_seconds() -> float:
    """Of the processes that were started here and have ended, and of theirs."""
    spent = os.times()
    return spent.children_user + spent.children_system


def child_file(out: Path, method: str) -> Path:
    return out.with_name(f".{out.stem}-{method}.json")


def fold_file(out: Path) -> Path:
    """Where the weights of the fold are kept until all methods that start from it are done."""
    return out.with_name(f".{out.stem}-fold.safetensors")


def plain_names(value: Any) -> Any:
    """Files by their names alone: where they lie on this machine is nobody's business."""
    if isinstance(value, list):
        return [plain_names(item) for item in value]
    return "+".join(base_name(part) for part in value.split("+")) if isinstance(value, str) else value


def base_name(part: str) -> str:
    name, equals, source = part.rpartition("=")
    return f"{name}{equals}{source.rsplit('/', 1)[-1]}"


def add_gaps_(rows: list[dict[str, Any]]) -> None:
    """Gap closed, for every perplexity of every row, once the dense and the cut model are measured."""
    by_name = {row["method"]: row for row in rows}
    if not {"dense", "cut"} <= {*by_name}:
        return

    def gaps(kind: str, figures: dict[str, float]) -> dict[str, float]:
        dense, cut = by_name["dense"][kind], by_name["cut"][kind]
        return {
            text: (math.log(cut[text]) - math.log(figures[text])) / (math.log(cut[text]) - math.log(dense[text]))
            for text in figures
        }

    seconds = by_name.get("endpoints", {}).get("cpu_seconds")
    for row in rows:
        if seconds and row.get("heldout_measure") == "kl":
            row["kl_at_equal_cpu_seconds"] = kl_after(row, seconds)
        row["gap_closed"] = gaps("perplexity", row["perplexity"])
        if "genres" in row:
            row["gap_closed_by_genre"] = gaps("genres", row["genres"])
        if row.get("equal_time"):
            row["equal_time"]["gap_closed"] = gaps("perplexity", row["equal_time"]["perplexity"])


def kl_after(row: dict[str, Any], seconds: float) -> float:
    """Held-out KL when so many CPU seconds had been trained: the best so far, between two scores on a straight line."""
    at = {point["step"]: point["cpu_seconds"] for point in row["curve"]} | {0: 0.0}
    scores = [(at[point["step"]], point["loss"]) for point in row["heldout"]]
    reached = [loss for when, loss in scores if when <= seconds + 0.01]
    for (start, first), (stop, second) in pairwise(scores):
        if start <= seconds < stop:
            reached.append(first + (second - first) * (seconds - start) / (stop - start))
    return min(reached)


def table(rows: list[dict[str, Any]]) -> str:
    texts = list(rows[0]["perplexity"])
    heads = ["method", "rate", "trained", "tokens/CPU s", "CPU s", "s", "memory MB", "KL", "KL at equal CPU s", *texts]
    heads += [f"gap {text}" for text in texts]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for row in rows:
        cells = [row["method"]]
        cells += [shown(row.get("rate"), "g"), shown(row.get("trained_parameters"), ",")]
        cells += [shown(row.get("tokens_per_cpu_second"), ".0f"), shown(row.get("cpu_seconds"), ".0f")]
        cells += [shown(row.get("seconds"), ".0f"), shown(megabytes(row.get("peak_above_weights_bytes")), ".0f")]
        cells += [shown(row.get("kl"), ".4f"), shown(row.get("kl_at_equal_cpu_seconds"), ".4f")]
        cells += [shown(row["perplexity"][text], ".1f") for text in texts]
        cells += [shown(row.get("gap_closed", {}).get(text), ".1%") for text in texts]
        lines.append("| " + " | ".join(cells) + " |")
    for row in rows:
        if anew := row.get("equal_time"):
            found = ", ".join(f"{text} {anew['gap_closed'][text]:.1%}" for text in texts if "gap_closed" in anew)
            took = f"{anew['cpu_seconds']:.0f} s, {anew['tokens']:,} tokens"
            lines += ["", f"{row['method']}, trained anew in the CPU seconds of endpoint tuning ({took}): {found}"]
    genres = [row for row in rows if row.get("gap_closed_by_genre")]
    if genres:
        names = list(genres[0]["genres"])
        lines += ["", "Gap closed by genre:", "", "| method | " + " | ".join(names) + " |"]
        lines += ["|---|" + "---:|" * len(names)]
        lines += [
            f"| {row['method']} | " + " | ".join(f"{row['gap_closed_by_genre'][name]:.1%}" for name in names) + " |"
            for row in genres
        ]
    return "\n".join(lines) + "\n"


def megabytes(value: int | None) -> float | None:
    return None if value is None else value / 1e6


def shown(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Held-out KL against tokens and against CPU seconds."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for row in rows:
        if not row.get("heldout") or row["heldout_measure"] != "kl":
            continue
        at = {point["step"]: point["cpu_seconds"] for point in row["curve"]} | {0: 0.0}
        losses = [point["loss"] for point in row["heldout"]]
        axes[0].plot([point["tokens"] for point in row["heldout"]], losses, label=row["method"])
        axes[1].plot([at[point["step"]] for point in row["heldout"]], losses)
    for axis, label in zip(axes, ("tokens", "CPU seconds"), strict=True):
        axis.set_xlabel(label)
    axes[0].set_ylabel("held-out KL, nats per token")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file)


# --- the child: one method --------------------------------------------------------------------------------------


def measure(args: Namespace) -> dict[str, Any]:
    opened = open_model(args.model)
    draw_blocks = partial(blocks, opened, window=args.window, seed=args.seed)
    calibration = draw_blocks(args.data, args.calibration_tokens).tokens
    heldout = draw_blocks(args.data, args.heldout_tokens, skip=len(calibration)).tokens
    skip = len(calibration) + len(heldout)
    tokens = draw_blocks(args.data, 2 * args.tune_tokens, skip=skip).tokens
    reported, genres = (
        {name: draw_blocks(source, size, order="as written").tokens for name, source in pairs(given)}
        for given, size in ((args.report, args.eval_tokens), (args.genres, args.genre_tokens))
    )
    dense, segment = DecoderRunner(opened.model), Segment.parse(args.segment)
    if args.only == "self-text":
        tokens = sampled(opened, args)
    folded = fold_file(args.out)
    if args.only == "fold":
        folded.unlink(missing_ok=True)  # its own row is of folding, not of reading
    start = partial(folded_student, dense, segment, calibration, None if args.only in UNFOLDED else folded)
    row: dict[str, Any] = {"method": args.only, "start": "cut" if args.only in UNFOLDED else "fold"}

    def figures(model: Any, texts: dict[str, torch.Tensor]) -> dict[str, float]:
        return {name: perplexity(model, text) for name, text in texts.items()}

    if args.only == "dense":
        measured = {"perplexity": figures(dense.model, reported), "genres": figures(dense.model, genres)}
        return row | {"start": "dense"} | measured
    if args.only in TUNED or args.only in BASELINES or args.only == PEER:
        heal = partial(healed_by_peer if args.only == PEER else healed, args, dense, segment)

        few = tokens[: max(1, args.rate_tokens // args.window)]

        def ends_at(rate: float) -> float:
            """Held-out loss where a short run ends, not its best."""
            return heal(start(), few, heldout, rate)["heldout"][-1]["loss"]

        weight = usual_weight([p for layer in dense.layers for p in layer.parameters()])
        tried = [] if args.rate else bracketed(rates(args.only, weight), ends_at)
        rate = args.rate or best(tried)["rate"]
        student = start()
        before = settled_bytes()
        whole = tokens[: max(1, args.tune_tokens // args.window)]
        run = heal(student, whole, heldout, rate)
        row |= {"peak_above_weights_bytes": high_water() - before, "rate": rate, "rates_tried": tried} | run
        row |= {f"tokens_per_{clock}": row["tokens"] / row[f"{clock}s"] for clock in ("second", "cpu_second")}
        row["heldout_measure"] = args.only if args.only in ("next-token", "mix", "lora-mix") else "kl"
        row["kl"] = model_kl(dense, student, heldout)
        row["perplexity"] = figures(student.model, reported)
        if args.only in GENRES:
            row["genres"] = figures(student.model, genres)
        again = partial(heal, heldout=heldout, rate=rate)
        row["equal_time"] = at_equal_time(args, row, tokens, start, again, figures, reported)
        return row
    before = settled_bytes()
    begun, cpu = time.perf_counter(), time.process_time()
    student = start()
    if args.only == "patch":
        patch_(dense, student, segment, calibration)
    row |= {"seconds": time.perf_counter() - begun, "cpu_seconds": time.process_time() - cpu}
    row |= {"peak_above_weights_bytes": high_water() - before}
    row |= {"kl": model_kl(dense, student, heldout), "perplexity": figures(student.model, reported)}
    return row | ({"genres": figures(student.model, genres)} if args.only in GENRES else {})


def sampled(opened: loading.LanguageModel, args: Namespace) -> torch.Tensor:
    """Text from the dense model itself, [N, T]."""
    return load_blocks(
        "self", opened.tokenizer, tokens=args.tune_tokens, window=args.window, seed=args.seed, model=opened.model
    ).tokens


def at_equal_time(
    args: Namespace, row: dict[str, Any], tokens: torch.Tensor, start: Any, heal: Any, figures: Any, reported: Any
) -> dict[str, Any] | None:
    """Trained again for the CPU seconds of endpoint tuning, if asked for; None where these are not known."""
    if args.only not in args.equal_time or not args.cpu_seconds:
        return None
    kept = ("tokens", "seconds", "cpu_seconds")
    count = min(round(args.cpu_seconds * row["tokens_per_cpu_second"] / args.window), len(tokens))
    if abs(count * args.window - row["tokens"]) < 0.05 * row["tokens"]:
        return {key: row[key] for key in kept} | {"perplexity": row["perplexity"], "same_run": True}
    run = heal(student := start(), tokens[: max(1, count)])
    return {key: run[key] for key in kept} | {"perplexity": figures(student.model, reported)}


def pairs(given: list[str]) -> list[tuple[str, str]]:
    """NAME=SOURCE, as they were given."""
    return [(name, source) for name, _, source in (item.partition("=") for item in given if item)]


def folded_student(
    dense: DecoderRunner, segment: Segment, calibration: torch.Tensor, folded: Path | None
) -> DecoderRunner:
    """The cut model; folded as well where a file is given, which the first to fold writes and the others read."""
    student = decoder_stack.share(dense.model)
    cut_segment_(student, [segment])
    stack = DecoderRunner(student)
    if folded is None:
        return stack
    if folded.is_file():
        decoder_stack.replace_parameters_(student, load_file(folded))
        return stack
    fold_cut_(stack, dense, segment, calibration)
    shared = {id(p) for p in dense.model.parameters()}
    save_file({name: p.detach() for name, p in student.named_parameters() if id(p) not in shared}, folded)
    return stack


def rates(method: str, weight: float) -> list[float]:
    if method == PEER:
        return list(PEER_RATES)
    if method in BASELINES:
        return list(BASELINES[method][1])
    return [factor * default_learning_rate(weight) for factor in (0.5, 1.0, 2.0)]


MOST_RATES = 9
"""How many rates are tried at most."""


def best(tried: list[dict[str, float]]) -> dict[str, float]:
    """The rate of the least loss; one that is no number is never the best."""
    return min(tried, key=lambda each: (not math.isfinite(each["heldout_loss"]), each["heldout_loss"]))


def bracketed(grid: list[float], loss_of: Callable[[float], float]) -> list[dict[str, float]]:
    """Rates and their losses, by rate: the grid, and beyond its edges, by the grid's own factor, for as long as the
    best is at an edge. SystemExit where MOST_RATES do not suffice: a best at the edge is none.
    """
    tried = [{"rate": rate, "heldout_loss": loss_of(rate)} for rate in sorted(grid)]
    while best(tried) in (tried[0], tried[-1]):
        if len(tried) >= MOST_RATES:
            raise SystemExit(f"error: the best rate of {len(tried)} is still at the edge: {best(tried)['rate']:g}")
        down = best(tried) is tried[0]
        first, second, *_ = tried if down else tried[::-1]
        rate = first["rate"] * first["rate"] / second["rate"]
        tried.insert(0 if down else len(tried), {"rate": rate, "heldout_loss": loss_of(rate)})
    return tried


def healed(
    args: Namespace, dense: DecoderRunner, segment: Segment,
    student: DecoderRunner, tokens: torch.Tensor, heldout: torch.Tensor, rate: float,
) -> dict[str, Any]:  # fmt: skip
    """Train the student; what it took."""
    if args.only in BASELINES:
        shared = shared_layers(dense, student)  # as the fold left it; asked before a head of its own hides it
        trained, first = BASELINES[args.only][0](student, segment)
        mix = MIX if args.only == "lora-mix" else 0.0
        by_autograd = args.only == "lora-autograd"
        prefix = min(first, shared)
        return train_(dense, student, trained, prefix, tokens, heldout, rate, args.batch_tokens, mix, by_autograd)
    how = {"learning_rate": rate, "batch_tokens": args.batch_tokens} | TUNED[args.only]
    reuse_freed()
    report = tune_(student, dense, tokens, heldout=heldout, **how)
    kept = ("tokens", "seconds", "cpu_seconds", "trained_parameters", "curve", "heldout")
    return {key: getattr(report, key) for key in kept}


def healed_by_peer(
    args: Namespace, dense: DecoderRunner, segment: Segment,
    student: DecoderRunner, tokens: torch.Tensor, heldout: torch.Tensor, rate: float,
) -> dict[str, Any]:  # fmt: skip
    """Have OptiPFair cut and train in its own environment, put its weights into the student; what it took."""
    with tempfile.TemporaryDirectory() as name, loading.quiet_transformers():
        model, text, out = (Path(name, part) for part in ("dense", "tokens.safetensors", "healed"))
        dense.model.save_pretrained(model)
        save_file({"tokens": tokens.clone(), "heldout": heldout.clone()}, text)
        command = [args.peer_python, Path(__file__).with_name("peer_optipfair.py")]
        command += ["--model", model, "--tokens", text, "--out", out, "--rate", rate]
        command += ["--batch-tokens", args.batch_tokens, "--threads", args.threads]
        command += ["--removed", *range(segment.start, segment.stop)]
        subprocess.run([str(word) for word in command], check=True)
        trained = AutoModelForCausalLM.from_pretrained(out, dtype=student.stored_dtype)  # as the others are saved
        decoder_stack.replace_parameters_(student.model, dict(trained.named_parameters()))
        return json.loads((out / "report.json").read_text())


def model_kl(dense: DecoderRunner, student: DecoderRunner, tokens: torch.Tensor) -> float:
    """Mean KL to the dense model, also of a student with embeddings of its own."""
    pair = Pair(dense=dense, student=student, prefix=0, objective=KL())
    return judged(HeldOut(pair, Rows(tokens=tokens), rows=max(1, PASS_TOKENS // tokens.shape[1])))


if __name__ == "__main__":
    main()
