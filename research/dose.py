"""Claim: how much more text, and more trained layers, bring back of what users lose.

    python research/dose.py --data C4+WIKI --texts wiki=WIKI.txt c4=C4.txt --tasks piqa,sciq --items 400 \
        --ways 131072 "131072 control" "131072 radius=2" "131072 train=lora"
    python research/dose.py …        # goes on: rows are kept, a way that was stopped is resumed

A way is its tokens, and what of a run's healing is given otherwise: `radius`, `train`, `learning_rate`. Each is one
`compress` up to the tuned checkpoint, in a folder under --work, with the text, probes, chats and fold of a run.
"131072 control" is the dense model with the same layers trained on the rows of "131072". All are judged beside the
dense model as in recall.py, by text, tasks, probes and replies that they were not tuned on.
"""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from common import RowsDone, arguments, finish, open_model
from layercut.config import DataConfig, EvaluateConfig, HealConfig, SearchConfig
from layercut.config.commands import CompressConfig, OutputConfig, RunConfig
from layercut.data.blocks import stored_blocks, stored_marks
from layercut.files import read_json
from layercut.healing import tune_
from layercut.healing.endpoint_tuning import TuningFiles
from layercut.healing.tuning_state import StateFile
from layercut.models import checkpoints, loading
from layercut.pipeline.journey import compress
from layercut.pipeline.stages.heal import tune_settings
from layercut.pipeline.stages.text import Treatment
from layercut.progress import say
from layercut.surgery import cut
from recall import judged, judges
from tasks_kept import ASKED, tasks_kept

KEPT = ("learning_rate", "trained_layers", "trained_parameters", "state_bytes", "heldout", "best_step", "setbacks",
        "tokens", "seconds", "cpu_seconds")  # fmt: skip
"""What a row has of a tuning."""


def config_of(way: str, args: Namespace) -> CompressConfig:
    """The run of a way."""
    tokens, *options = way.split()
    given: dict[str, Any] = dict(option.split("=") for option in options)
    kinds = {"radius": int, "learning_rate": float, "train": str}
    heal = HealConfig(tune_tokens=int(tokens), **{name: kinds[name](value) for name, value in given.items()})
    return CompressConfig(
        text=DataConfig(data=args.data, tokens=args.tokens, seed=args.seed),
        search=SearchConfig(segment=tuple(args.segments)), heal=heal,
        evaluate=EvaluateConfig(eval_data=args.texts[0].partition("=")[2], eval_tokens=2),
        output=OutputConfig(format="safetensors"),
        run=RunConfig(out=Path(args.work) / "-".join(way.replace("=", "-").split())),
    )  # fmt: skip


def healed(model: loading.LanguageModel, way: str, args: Namespace) -> tuple[Any, dict[str, Any]]:
    """The healed model of a way, and what its tuning took."""
    config, begun = config_of(way.removesuffix(" control"), args), time.perf_counter()
    run = compress(model.checkpoint.name, config, until="tune")
    if way.endswith(" control"):
        small, tuning = control(model.model, run, config)
    else:
        small, tuning = (
            loading.load(checkpoints.resolve(str(run / "model"))).model,
            read_json(run / "heal.json")["tuning"],
        )
    return small, {"tuning": {key: tuning[key] for key in KEPT}, "run_seconds": time.perf_counter() - begun}


def control(dense: Any, run: Path, config: CompressConfig) -> tuple[Any, dict[str, Any]]:
    """The dense model with the layers beside a run's cut trained on its rows; a tuning that was stopped is resumed."""
    small, rows = cut(dense, ()), stored_blocks(run, "tuning")
    origins = read_json(run / "text-tuning.json")["origins"]
    treated = Treatment.as_drawn(rows, origins, stored_marks(run, "tuning"), short=config.text.window)
    state = StateFile(run / "control.safetensors")
    found = tune_(
        small, dense, rows, heldout=stored_blocks(run, "heldout"), settings=tune_settings(config.heal),
        beside=config.search.segments, files=TuningFiles(state=state), **vars(treated),
    )  # fmt: skip
    return small, vars(found)


def main() -> None:
    args = arguments(
        __doc__ or "", data="c4", texts=["wiki=wikitext2"], ways=["131072"], segments=["4:6", "12:16"], tokens=16384,
        eval_tokens=32768, window=256, longest=1024, trials=6, seed=0, work="runs/dose", **ASKED,
    )  # fmt: skip
    model = open_model(args.model)
    texts, probes = judges(model, args, rows=48)
    named = ("segments", "tokens", "eval_tokens", "window", "longest", "trials", "seed", "items")
    facts = {key: getattr(args, key) for key in named} | {"data": [Path(part).name for part in args.data.split("+")]}
    done = RowsDone(args.out, facts)
    for way in ("dense", *args.ways):
        if {"way": way} in done:
            continue
        small, row = (model.model, {}) if way == "dense" else healed(model, way, args)
        begun = time.perf_counter()
        with torch.no_grad():
            row |= judged(model, small, texts, probes) | tasks_kept(model, small, args)
        done.add({"way": way, **row, "judging_seconds": time.perf_counter() - begun})
        kept = row.get("retained", {}).get("mean")
        say(way, f"{row['perplexity']}, keys {row['keys_found']}, lists {row['lists_found']}, tasks {kept}")
    finish(args.out, model, (__doc__ or "").splitlines()[0], done.rows, **facts)
    done.partial.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
