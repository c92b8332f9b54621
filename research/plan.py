"""Claim: `layercut plan` foretells the peak memory of every stage within a quarter, from the config alone.

    python research/plan.py [--models smollm2 qwen2 llama] [--dtypes auto float32] [--stages load …]

Three shapes: the demo's SmolLM2-135M, and two with random weights (a Qwen2 of 0.3B parameters and a vocabulary of
152k, tied; a Llama of 0.5B and a vocabulary of 32k, untied). Every stage runs in a process of its own, through the
pipeline's own code; its peak is the process's resident high-water mark, set back after the model is loaded (Linux).
For export the fresh process that verifies the checkpoint is added, since both live at the same time. Memory and time
do not depend on what the tokens say: they are random. The same settings are planned by the same code as the
command. float32 is what a CPU without bfloat16 computes in.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from common import arguments
from layercut.cli.demo import fetch_model
from layercut.config import DataConfig, EvaluateConfig, HealConfig, ModelConfig, SearchConfig
from layercut.config.commands import CompressConfig
from layercut.data.blocks import TextFacts
from layercut.files import write_json
from layercut.models import checkpoints, decoder_stack, loading
from layercut.pipeline import stages
from layercut.pipeline.artefacts import (
    BeforeAfter,
    CutArtefact,
    FoldArtefact,
    HealArtefact,
    QuantizeArtefact,
    SearchArtefact,
    SharedText,
)
from layercut.pipeline.environment import environment
from layercut.pipeline.run_context import RunContext
from layercut.pipeline.run_folder import Run
from layercut.segments import Segment
from memory import Children, high_water, reset_peak

STAGES = ["load", "exhaustive", "fisher", "fold", "tune", "eval", "export"]
LENGTH = 0.2
NOTHING = BeforeAfter(before=0, after=0)
ASSUMED: dict[str, Any] = {
    "cut": CutArtefact(segments=[], original_layer_index=[], parameters=NOTHING, bytes=NOTHING),
    "fold": FoldArtefact(fold=[], changed=[]),
    "heal": HealArtefact(fold=[], tuning=None, changed=[]),
    "quantize": QuantizeArtefact(bits=16, layers=[]),
    "text-shared": SharedText(documents=0, passages=0.0, passed_over=0),
}
"""What the stages before the one that is measured left: nothing is changed."""
KEYS = ("model", "dtype", "stage")


def main() -> None:
    if os.environ.get("LAYERCUT_PLAN_STAGE"):
        return measure(json.loads(os.environ["LAYERCUT_PLAN_STAGE"]))
    args = arguments(
        __doc__, models=["smollm2", "qwen2", "llama"], dtypes=["auto"], stages=STAGES, tokens=1024, window=128
    )
    rows: list[dict[str, Any]] = json.loads(args.out.read_text())["rows"] if args.out.is_file() else []
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.models:
            model = make_model(name, Path(scratch))
            for dtype in args.dtypes:
                for row in planned_and_measured(name, model, dtype, args, Path(scratch)):
                    rows = [r for r in rows if any(r[key] != row[key] for key in KEYS)] + [row]
                    print(row, flush=True)
                    write(args.out, rows)
    print(table(rows))


def write(out: Path, rows: list[dict[str, Any]]) -> None:
    environ = environment()
    environ["command"] = [Path(sys.argv[0]).name, *(a for a in sys.argv[1:] if not a.startswith("/"))]
    out.parent.mkdir(parents=True, exist_ok=True)
    errors = [abs(row["bytes"]["planned"] / row["bytes"]["measured"] - 1) for row in rows]
    worst = {"worst_memory_error": max(errors)} if errors else {}
    write_json(out, {"claim": __doc__.splitlines()[0], **worst, "rows": rows, "environment": environ})


def table(rows: list[dict[str, Any]]) -> str:
    """For docs: planned and measured, side by side."""
    lines = ["| model | numbers | stage | peak planned | measured | planned / measured | seconds planned | measured |"]
    lines.append("|---|---|---|---:|---:|---:|---:|---:|")
    for r in rows:
        b, s = r["bytes"], r["seconds"]
        planned = "" if s["planned"] is None else f"{s['planned']:.1f}"
        lines.append(
            f"| {' | '.join(r[key] for key in KEYS)} | {b['planned'] / 1e6:,.0f} MB | {b['measured'] / 1e6:,.0f} MB "
            f"| {b['planned'] / b['measured']:.2f} | {planned} | {s['measured']:.1f} |"
        )
    return "\n".join(lines)


# --- the models ---


def make_model(name: str, scratch: Path) -> Path:
    """The demo's model, or a folder with random weights and a byte-level tokenizer."""
    if name == "smollm2":
        return fetch_model()
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    shapes = {
        "qwen2": Qwen2Config(
            vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=12,
            num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
        ),
        "llama": LlamaConfig(
            vocab_size=32000, hidden_size=1280, intermediate_size=3456, num_hidden_layers=24,
            num_attention_heads=20, num_key_value_heads=4, tie_word_embeddings=False,
        ),
    }  # fmt: skip
    folder = scratch / name
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shapes[name], dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> Any:
    """Bytes as tokens: enough for the prompts that evaluation generates from."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as cores
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(cores.BPE({letter: i for i, letter in enumerate(letters)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=letters[0])


# --- planned and measured ---


def settings(args: dict[str, Any], method: str = "exhaustive") -> CompressConfig:
    return CompressConfig(
        text=DataConfig(tokens=args["tokens"], window=args["window"]),
        load=ModelConfig(dtype=args["dtype"]),
        search=SearchConfig(ratio=LENGTH, method=method),
        heal=HealConfig(tune_tokens=4096),
        evaluate=EvaluateConfig(eval_tokens=2048, eval_window=args["window"]),
    )


def planned_and_measured(name: str, model: Path, dtype: str, args: Any, scratch: Path) -> Iterator[dict[str, Any]]:
    given = {"dtype": dtype, "tokens": args.tokens, "window": args.window}
    folder = scratch / f"run-{name}-{dtype}"
    plans = {method: planned(model, given, method) for method in ("exhaustive", "fisher")}
    for stage in args.stages:
        job = given | {"model": str(model), "stage": stage, "folder": str(folder)}
        env = os.environ | {"LAYERCUT_PLAN_STAGE": json.dumps(job)}
        done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{name} {stage}: {done.stderr}")
        seen = json.loads(done.stdout.splitlines()[-1])
        plan = plans["fisher" if stage == "fisher" else "exhaustive"]
        figures = plan["stages"]["search" if stage in ("fisher", "exhaustive") else stage]
        yield {
            "model": name,
            "stage": stage,
            **given,
            "bytes": {"planned": figures["peak_bytes"], "measured": seen["peak"]},
            "seconds": {"planned": figures["seconds"], "measured": seen["seconds"]},
            "before": seen["before"],
            "parts": figures["parts"],
            "work": seen["work"],
        }


def planned(model: Path, given: dict[str, Any], method: str) -> dict[str, Any]:
    """In a process of its own, as the command is: what this one holds is not to be counted."""
    flags = ["--tokens", given["tokens"], "--window", given["window"], "--ratio", LENGTH, "--method", method]
    flags += ["--dtype", given["dtype"], "--tune-tokens", 4096, "--eval-tokens", 2048, "--json"]
    command = [sys.executable, "-m", "layercut.cli.command_line", "plan", str(model), *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def measure(job: dict[str, Any]) -> None:
    """One stage, in this process; prints its peak resident bytes and seconds."""
    stage = job["stage"]
    config = settings(job, "fisher" if stage == "fisher" else "exhaustive")
    checkpoint = checkpoints.resolve(job["model"])
    with Run(Path(job["folder"])) as run:
        run.describe({"model": job["model"]})
        work = RunContext(checkpoint, config, run)
        layers = decoder_stack.count_layers(loading.load_config(checkpoint))
        length = round(LENGTH * layers)
        segments = [Segment((layers - length) // 2, (layers - length) // 2 + length)]
        draw_tokens(work, config)
        jobs: dict[str, Callable[[], Any]] = {
            "load": lambda: work.dense,
            "exhaustive": lambda: stages.search.search(work, [], length),
            "fisher": lambda: stages.search.search(work, [], length),
            "fold": lambda: stages.heal.fold(work, segments),
            "tune": lambda: stages.heal.tune(work, segments),
            "eval": lambda: stages.evaluate.evaluate(work, segments),
            "export": lambda: stages.export.export(work, segments),
        }
        if stage != "load":
            _ = work.stack
            for name, artefact in ASSUMED.items():
                assume(run, name, artefact)
        before = reset_peak()
        children = Children() if stage == "export" else None
        begun = time.perf_counter()
        jobs[stage]()
        seconds = time.perf_counter() - begun
        peak = high_water() if children is None else children.stop()
        found = run.artefact(SearchArtefact, "search") if stage in ("exhaustive", "fisher") else None
    keys = ("layer_forwards", "layer_backwards")
    spent = {key: getattr(found and found.cost, key, None) for key in keys}
    print(json.dumps({"peak": peak, "before": before, "seconds": seconds, "work": spent}))


def assume(run: Run, name: str, artefact: Any) -> None:
    """A stage that was not run, with what it is taken to have left."""
    with run.stage(type(artefact), name, "assumed") as stage:
        if stage.open:
            stage.found = artefact


def draw_tokens(work: RunContext, config: CompressConfig) -> None:
    """Random tokens of the sizes that the text stage would draw."""
    window = config.text.window
    counts = {
        "calibration": config.text.tokens,
        "heldout": 1024,
        "tuning": config.heal.tokens,
        "evaluation": config.evaluate.eval_tokens,
    }
    drawn = {use: torch.randint(250, (-(-count // window), window)) for use, count in counts.items()}
    for use, tokens in drawn.items():
        save_file({use: tokens}, work.run / f"tokens-{use}.safetensors")
        facts = TextFacts(
            source="random", reads=[], origins=[""], tokens=tokens.numel(), window=window, documents=0, passed_over=0,
            fingerprint="",
        )  # fmt: skip
        assume(work.run, f"text-{use}", facts)
        work.text[use] = facts


if __name__ == "__main__":
    main()
