"""Claim: size against perplexity by fewer layers, fewer bits and both; which is better at equal bytes is measured.

    python research/frontier.py --data TUNE.txt --report wiki=WIKI.txt web=WEB.txt
    python research/frontier.py …      # goes on: points, healed models and tuning that was under way are kept

For every ratio of layers the model is cut (by the search) and healed (fold, endpoint tuning) once; every setting of
the quantizer is then measured on it, before and, where it says `train`, after its scales or its rounding are trained
towards what was rounded: settings are "bf16", those of tune_quantized.py, and "Q4_0 throughout (GGUF)". Every point has
bytes, perplexity by text, how many of the keys hidden in up to --longest tokens are found, and, with `--tasks
arc_easy,piqa [--include-path FOLDER] --items 400`, what is left of the scores of lm-eval's tasks (not before a training
that follows).
Weights read from a 4-bit GGUF file lie on a 4-bit grid, which 4-bit formats re-hit for free: where the model is a .gguf
file all these points, 16 bits too, are taken on a *dithered control* (control.py). Beside them, `--gguf-ratios`: the
file itself, cut and healed as it came, kept tensors byte for byte. Bytes are those of all weights as they are stored,
embeddings, scales and zero points included; of GGUF the whole file's stand beside. Finished points and healed models
are kept in --work; remove it to start anew. `--cuts 0.2=6:7+10:14` gives the layers of a ratio, which are then not
searched. Writes OUT.json and OUT.svg.
"""

from __future__ import annotations

import json
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common import arguments, blocks, finish, named, open_model
from control import dither_, healed, save
from fronts import BUDGETS, SMALLER, WAYS, answers, extra_losses, front, loss, way
from layercut import cli
from layercut.config import DataConfig, EvaluateConfig, HealConfig, SearchConfig
from layercut.config.commands import CompressConfig, OutputConfig, RunConfig
from layercut.evaluation import perplexity
from layercut.evaluation.probe_scores import found_of, passkey, retrieval_grid, trials
from layercut.export.gguf_tensors import architecture_of, gguf_tensors
from layercut.files import read_json, write_json
from layercut.models import checkpoints, decoder_stack, loading
from layercut.pipeline.journey import compress
from layercut.pipeline.stages.quantize import ROWS, TOWARDS
from layercut.segments import Segment
from layercut.surgery import cut_gguf
from tasks_kept import ASKED, tasks_kept
from tune_quantized import PEER, TRAINING, Text, drawn, parsed, rounded, trained_

Row = dict[str, Any]
Kind = tuple[tuple[str, Any], ...]
GGUF = {"Q4_0 throughout (GGUF)": "q4_0"}
"""All matrices in one type, embeddings too, of a model that came from a .gguf file; rounded to nearest, by the
library's functions: no flag of the command writes it."""
HELDOUT = 2048
"""Tokens that judge what is trained after rounding."""
ELSEWHERE = ("removed", "beside", "iterations", "calibration")
"""Words of tune_quantized.py's settings that say what is given otherwise here: layers and text."""
SETTINGS = [
    "bf16",
    "bits=8 embeddings=8 quantizer=rtn",
    "bits=6 embeddings=8 rounding_tests=0.25 train=scales",
    "bits=4 embeddings=8 rounding_tests=0.25 train=scales",
    "bits=4 embeddings=4 rounding_tests=0.25 train=scales",
    "bits=3 embeddings=3 rounding_tests=0.25 train=rounding tests=0.1 tokens=32768",
    *GGUF,
]


@dataclass(frozen=True)
class Given:
    """What every point is measured on."""

    texts: dict[str, torch.Tensor]
    text: dict[Kind, Text]
    """To calibrate the quantizer on, to train after it on, and what judges that [N, T], by `rows_of` a setting."""
    gguf: Path | None
    """The file the model came from."""
    tokenizer: Any
    keys: list[tuple[int, float, list[int], str]]
    """Prompts with hidden keys."""
    tasks: Callable[[Any], Row]
    """What of a model's task scores is left; nothing where none is asked."""
    train_tokens: int
    """What a setting is trained on after rounding unless it says so."""


def main() -> None:
    args = arguments(
        __doc__, data="python-docstrings", report=["docs=python-docs"], ratios=[0.0, 0.1, 0.2, 0.3, 0.37, 0.4, 0.57],
        gguf_ratios=[0.0, 0.1, 0.2, 0.3], settings=SETTINGS, method="fisher", preserve="none", num_segments="1",
        window=256, seed=0, search_tokens=4096, tune_tokens=131072, quantize_tokens=8192,
        train_tokens=16384, eval_tokens=16384, longest=1024, dither="auto", threads=2, cuts=[""],
        work=Path("runs/frontier"), **ASKED,
    )  # fmt: skip
    torch.set_num_threads(args.threads)
    opened = open_model(args.model)
    gguf = opened.checkpoint.file if opened.checkpoint.gguf else None
    dithered = args.dither == "yes" or (args.dither == "auto" and gguf is not None)
    sources = dict(item.split("=", 1) for item in args.report)
    asked = ("data", "method", "preserve", "num_segments", "window", "seed", "search_tokens", "tune_tokens",
             "quantize_tokens", "eval_tokens", "longest")  # fmt: skip
    facts = {"weights": "dithered control" if dithered else "as they came", "texts": sources}
    facts |= {"trained_towards": TOWARDS, "tests_in": ROWS} | {name: getattr(args, name) for name in asked}
    facts |= {"cuts": cuts} if (cuts := cuts_of(args)) else {}
    facts |= {"tasks": args.tasks.split(","), "items": args.items} if args.tasks else {}
    kept = Kept(args.work / "points.json", named(facts | {"model": opened.checkpoint.name}))
    texts = {
        name: blocks(opened, source, args.eval_tokens, args.window, args.seed, order="as written").tokens
        for name, source in sources.items()
    }

    if not kept.has("as loaded", 0.0, "bf16"):
        kept.add("as loaded", 0.0, "bf16", {"perplexity": perplexities(opened.model, texts)})
    folder = args.work / "dense"
    if not folder.exists():
        if dithered:
            dither_(opened.model, args.seed)
        save(opened, folder)
    dense = loading.load(checkpoints.resolve(str(folder)))
    parts = [parsed(name, args.train_tokens) for name in args.settings if "=" in name]
    most = max([HELDOUT, *(part["tokens"] for part in parts)])
    after = Namespace(data=args.data, window=args.window, tune_window=args.window, seed=args.seed,
                      tokens=args.quantize_tokens, heldout_tokens=HELDOUT, tune_tokens=most)  # fmt: skip
    longest = min(args.longest, decoder_stack.positions(dense.model.config) or args.longest)
    keys = trials(passkey, dense.tokenizer, longest, args.seed)
    text = {kind: drawn(dense, dict(kind), after) for kind in {(), *map(rows_of, parts)}}
    given = Given(texts, text, gguf, dense.tokenizer, keys, partial(tasks_kept, dense, args=args), args.train_tokens)
    # the dense model in 16 bits is what all else is laid beside
    settings = [name for name in dict.fromkeys(["bf16", *args.settings]) if gguf or name not in GGUF]
    for ratio in dict.fromkeys([0.0, *args.ratios]):
        missing = [
            name for name in settings
            if not all(kept.has("control", ratio, one) for one in points_of(name, args.train_tokens))
        ]  # fmt: skip
        if missing:
            model, told = opened_at(ratio, folder, args, sources)
            for name in missing:
                for point, row in measured(model, name, told["segments"], given):
                    if not kept.has("control", ratio, point):
                        kept.add("control", ratio, point, told | row)
    for ratio in dict.fromkeys([0.0, *args.gguf_ratios]):
        if gguf and not kept.has("gguf", ratio, "Q4_1 kept"):
            kept.add("gguf", ratio, "Q4_1 kept", kept_tensors(gguf, ratio, args, sources, texts))

    found = compared(kept.rows)
    plot(found, args.out.with_suffix(".svg"))
    finish(args.out, opened, (__doc__ or "").splitlines()[0], found["points"], **facts, **found["facts"])


class Kept:
    """The finished points, on disk from the moment each is measured."""

    def __init__(self, file: Path, facts: Row) -> None:
        self.file, self.facts = file, json.loads(json.dumps(facts))
        there = json.loads(file.read_text()) if file.is_file() else {"facts": self.facts, "rows": []}
        if there["facts"] != self.facts:
            raise SystemExit(f"error: {file} was made with other settings\nhint: give another --work, or remove it")
        self.rows: list[Row] = there["rows"]
        self.begun = time.process_time()

    def has(self, points: str, ratio: float, setting: str) -> bool:
        return any((row["points"], row["ratio"], row["setting"]) == (points, ratio, setting) for row in self.rows)

    def add(self, points: str, ratio: float, setting: str, row: Row) -> None:
        now = time.process_time()
        spent = {"cpu_seconds": round(now - self.begun, 1)}  # healing is with the first point of its ratio
        row = {"points": points, "ratio": ratio, "setting": setting, **row, **spent}
        self.rows.append(row)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.file, {"facts": self.facts, "rows": self.rows})
        self.begun = now
        print(json.dumps(row), flush=True)


# --- models --------------------------------------------------------------------------------------------------


def stages(args: Namespace, ratio: float) -> tuple[SearchConfig, DataConfig, HealConfig]:
    """How a ratio is searched, where its layers are not given, and healed."""
    segments = args.num_segments if args.num_segments == "auto" else int(args.num_segments)
    how = {"ratio": ratio, "num_segments": segments, "method": args.method}
    if cut := cuts_of(args).get(f"{ratio:g}"):
        how = {"segment": tuple(cut.split("+"))}
    return (
        SearchConfig(preserve=args.preserve, **how),
        DataConfig(data=args.data, tokens=args.search_tokens, window=args.window, seed=args.seed),
        HealConfig(tune_tokens=args.tune_tokens),
    )


def cuts_of(args: Namespace) -> dict[str, str]:
    """The layers of --cuts that go, as "6:7+10:14", by their ratio; of the others they are searched."""
    cuts = dict(item.split("=", 1) for item in args.cuts if item)
    if unread := sorted(cuts.keys() - {f"{ratio:g}" for ratio in args.ratios}):
        raise SystemExit(f"error: --cuts of {', '.join(unread)}, which --ratios lacks\nhint: --ratios {' '.join(cuts)}")
    return cuts


def opened_at(ratio: float, dense: Path, args: Namespace, sources: dict[str, str]) -> tuple[Any, Row]:
    """The control without a share of its layers, healed; and what that took."""
    place, told = dense, Row(segments=[])
    if ratio:
        run = args.work / f"control-{ratio:g}"
        place = healed(dense, run, *stages(args, ratio), next(iter(sources.values())))
        told = healing(run)
    model = loading.load(checkpoints.resolve(str(place))).model
    return model, told | {"layers": len(decoder_stack.find_decoder(model))}


def healing(run: Path) -> Row:
    """From a run's artefacts: what was removed, how far it was healed on held-out tokens, and the seconds.

    KL(p || q) of the cut and the folded model; what was tuned for, part of it the next token's loss, before and after.
    """
    search, fold, heal = (read_json(run / f"{name}.json") for name in ("search", "fold", "heal"))
    folds, losses = fold["fold"], [point["loss"] for point in heal["tuning"]["heldout"]]
    return {
        "segments": search["segments"],
        "heldout_kl": {"cut": folds[0]["kl_before"], "folded": folds[0]["kl_after"]},
        "heldout_loss": {"folded": losses[0], "tuned": min(losses)},
        "healing_seconds": {"search": search["seconds"], "fold": fold["seconds"], "tune": heal["seconds"]},
    }


# --- points --------------------------------------------------------------------------------------------------


def perplexities(model: Any, texts: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: perplexity(model, tokens) for name, tokens in texts.items()}


def points_of(setting: str, tokens: int) -> list[str]:
    """The points that a setting makes: as it is rounded, and once more as it is trained."""
    if "=" not in setting:
        return [setting]
    words = setting.split()
    if unread := [word for word in words if word.partition("=")[0] in ELSEWHERE or word.endswith(PEER)]:
        raise SystemExit(f"error: {unread[0]} is not read here\nhint: tune_quantized.py does")
    plain = [word for word in words if word.partition("=")[0] not in TRAINING]
    if parsed(setting, tokens)["train"] == "none":
        return [" ".join(plain)]
    return [" ".join(plain), " ".join(words if "tokens=" in setting else [*words, f"tokens={tokens}"])]


def rows_of(asked: Row) -> Kind:
    """What of a setting decides the rows that it is rounded and trained on."""
    names = ["rounding_tests", "tests", *["batch"] * ("tests" in asked)]
    return tuple((name, asked[name]) for name in names if name in asked)


def measured(model: Any, setting: str, segments: list[list[int]], given: Given) -> Iterator[tuple[str, Row]]:
    """The points of a setting, with bytes, perplexity and keys found; the model stays as it is."""
    rounding, *training = points_of(setting, given.train_tokens)
    if setting in GGUF:
        yield rounding, throughout(model, GGUF[setting], segments, given)
    elif "=" not in setting:
        yield rounding, {"bytes": decoder_stack.parameter_bytes(model), **judged(model, given)}
    else:
        asked = parsed(setting, given.train_tokens)
        text = given.text[rows_of(asked)]
        found = rounded(model, asked, text.rounding)
        chosen = {"mean_bits": found.mixture["mean_bits"]} if found.mixture else {}
        yield rounding, chosen | {"bytes": found.bytes_after, **judged(found.model, given, tasks=not training)}
        for point in training:
            found, told = trained_(found, model, asked, text)
            yield point, chosen | {"bytes": found.bytes_after, "trained": told, **judged(found.model, given)}


def judged(model: Any, given: Given, tasks: bool = True) -> Row:
    """Perplexity by text; of the keys that are hidden in texts of several lengths those found; scores of tasks."""
    hits, asked = found_of(retrieval_grid(model, given.tokenizer, given.keys))
    found = {"perplexity": perplexities(model, given.texts), "keys_found": hits, "keys_asked": asked}
    return found | (given.tasks(model) if tasks else {})


def throughout(model: Any, gguf_type: str, segments: list[list[int]], given: Given) -> Row:
    """The model as a .gguf file with all matrices in one type, read back by transformers."""
    source = given.gguf
    assert source is not None
    tensors = gguf_tensors(dict(model.named_parameters()), model.config, architecture_of(source), gguf_type)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        cut_gguf(source, [Segment(*bounds) for bounds in segments], file, replaced=tensors)
        again = loading.load(checkpoints.resolve(str(file))).model
        size = sum(data.nbytes for data, _ in tensors.values())
        return {"bytes": size, "file_bytes": file.stat().st_size, **judged(again, given)}


def kept_tensors(
    source: Path, ratio: float, args: Namespace, texts_by: dict[str, str], texts: dict[str, torch.Tensor]
) -> Row:
    """The .gguf file cut and healed as it came, by `compress` and `export`: healed layers Q8_0, all else as it was."""
    if not ratio:
        model = loading.load(checkpoints.resolve(str(source))).model
        told = {"segments": [], "layers": len(decoder_stack.find_decoder(model))}
        return told | {"bytes": source.stat().st_size, "perplexity": perplexities(model, texts)}
    search, text, heal = stages(args, ratio)
    apart = EvaluateConfig(
        eval_data=next(iter(texts_by.values())), eval_tokens=args.window, eval_window=args.window, speed=False
    )
    run = args.work / f"gguf-{ratio:g}"
    output = OutputConfig(format="safetensors")
    config = CompressConfig(search=search, text=text, heal=heal, evaluate=apart, output=output, run=RunConfig(out=run))
    compress(str(source), config)
    file = args.work / f"cut-{ratio:g}.gguf"
    if cli.main(["export", str(run), f"--out={file}", "--gguf-type=q8_0", "--force"]):
        raise SystemExit(f"error: {run} could not be exported")
    model = loading.load(checkpoints.resolve(str(file))).model
    told = healing(run) | {"layers": len(decoder_stack.find_decoder(model))}
    return told | {"bytes": file.stat().st_size, "perplexity": perplexities(model, texts)}


# --- what they say -------------------------------------------------------------------------------------------


def compared(rows: list[Row]) -> dict[str, Any]:
    """Every row beside the dense one of its kind, and the answers from those of the control."""
    loaded = next(row for row in rows if row["points"] == "as loaded")
    kinds = {kind: [row for row in rows if row["points"] == kind] for kind in ("control", "gguf")}
    control = [row | {"way": way(row)} for row in beside_dense(kinds["control"])]
    facts = {"perplexity_as_loaded": loaded["perplexity"], "answers": answers(control)}
    points = [*control, *beside_dense(kinds["gguf"])]
    return {"points": points, "facts": facts | {"quantizing": extra_losses(control)}}


def beside_dense(rows: list[Row]) -> list[Row]:
    """With share of the dense bytes, rise of perplexity and what is retained, dense / compressed, by text."""
    found = []
    for row in sorted(rows, key=lambda row: (row["ratio"], -row["bytes"])):
        dense = next(r for r in rows if not r["ratio"] and r["setting"] in ("bf16", "Q4_1 kept"))
        times = {text: value / dense["perplexity"][text] for text, value in row["perplexity"].items()}
        more = {"share": row["bytes"] / dense["bytes"], "rise": {text: value - 1 for text, value in times.items()}}
        found.append(row | more | {"retention": {text: 1 / value for text, value in times.items()}})
    return found


def plot(found: dict[str, Any], file: Path) -> None:
    """Rise of perplexity over bytes: all points, and the front of each way."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    colours = dict(zip(WAYS, ("#8a8a94", "#2b7fd0", "#e07b28"), strict=True))
    points = [row for row in found["points"] if row["points"] == "control"]
    dense = next(row for row in points if row["way"] == "dense")
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "layercut", "text.parse_math": False}):
        canvas = Figure(figsize=(7, 4.4), layout="constrained")
        axes = canvas.subplots()
        for name, colour in colours.items():
            own = [row for row in points if row["way"] == name]
            axes.plot([p["bytes"] / 1e6 for p in own], [100 * loss(p) for p in own], "o", ms=4, color=colour, alpha=0.5)
            line = front([*own, dense] if name != "both" else own)
            axes.plot([p["bytes"] / 1e6 for p in line], [100 * loss(p) for p in line], lw=1.8, color=colour, label=name)
        for budget in BUDGETS:
            axes.axhline(100 * budget, color="#c8c8d0", lw=0.8, ls=(0, (4, 3)), zorder=0)
        axes.axvline((1 - SMALLER) * dense["bytes"] / 1e6, color="black", lw=1, ls=(0, (4, 3)), zorder=0)
        axes.annotate(f" {SMALLER:.0%} smaller", ((1 - SMALLER) * dense["bytes"] / 1e6, 0), va="bottom", fontsize=9)
        axes.set_yscale("symlog", linthresh=100 * BUDGETS[0], linscale=0.5)
        axes.set_yticks([0, *(100 * budget for budget in BUDGETS), 100, 1000])
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        axes.set_ylim(bottom=min(0.0, *(100 * loss(p) for p in points)) - 0.5)
        axes.set_xlim(left=0)
        axes.set_xlabel("weights, MB")
        axes.set_ylabel("rise of perplexity (worst text)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        file.parent.mkdir(parents=True, exist_ok=True)
        canvas.savefig(file, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
