"""Claim: on an accelerator, a cut's stages take what the plan says, tuning comes near its matrix products, and what is
left decodes faster.

    make gpu                                    # the tests that need an accelerator, and then this
    python research/gpu.py [--models 8b 7b smollm2] [--seconds 480] [--tiny] [--out FILE]

Per model: `layercut plan` for this machine; search, fold and tuning of a fifth of the layers, each with its seconds and
its peak of device memory beside the planned ones; tuning's tokens a second beside those of its matrix products at the
rate measured here (`tuning_speed.py` counts them); prefill and decode, dense and cut in turn, in bfloat16 and in 4
bits, by transformers (4 bits by torchao's kernels, where it is installed) and by vLLM, where it is.

"8b" and "7b" have the shapes of Llama 3 8B and Llama 2 7B, and random weights that are made on the device: nothing is
fetched. "smollm2" is the demo's model, from the package index. Any other name is a Hub id, a folder or a .gguf file.
Parts for which no time is left, or no package or memory, say so in the result. --tiny: the same with shapes that a CPU
takes in seconds, for trying this file out; its figures say nothing.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import layercut as lc
from common import RESULTS, named
from layercut.cli.demo import fetch_model
from layercut.config import DataConfig, EvaluateConfig, HealConfig, ModelConfig, SearchConfig
from layercut.config.commands import PlanConfig
from layercut.evaluation.speed import peak_device_bytes, speed
from layercut.files import write_json
from layercut.healing.recipe import endpoints
from layercut.models import checkpoints, decoder_stack, loading
from layercut.models.runner import DecoderRunner
from layercut.pipeline.environment import environment
from layercut.plan import plan_run
from layercut.quantization import quantize
from tuning_speed import matrix_rate, operations

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 5e5},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32, "vocab_size": 32000},
}  # fmt: skip
TINY: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 5, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 256}  # fmt: skip
RATIO, WINDOW = 0.2, 256
AMOUNTS = {"tokens": 16384, "tune_tokens": 32768, "prompt": 512, "decode": 64, "repeats": 3, "square": 8192}
TINY_AMOUNTS = {"tokens": 1024, "tune_tokens": 1024, "prompt": 16, "decode": 2, "repeats": 1, "square": 64}


class Clock:
    """The time that is left, and the parts that had none."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def part(self, least: float, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What a part finds, if `least` seconds are left for it; else why it was left out."""
        if self.left < least:
            return {"skipped": f"{max(0.0, self.left):.0f} s were left"}
        try:
            return work()
        except torch.OutOfMemoryError:
            return {"skipped": "out of memory"}
        except ImportError as error:
            return {"skipped": f"{error.name} is not installed"}


def made(name: str, device: torch.device, tiny: bool) -> tuple[Any, str | None]:
    """The model on the device, and where its files are; None of one that has none."""
    if name in SHAPES:
        config = LlamaConfig(**(TINY if tiny else SHAPES[name]), max_position_embeddings=4096)
        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        return model.eval().requires_grad_(False), None
    source = str(fetch_model()) if name == "smollm2" else name
    return loading.load(checkpoints.resolve(source), device=str(device)).model, source


def planned(model: Any, source: str | None, device: torch.device, amounts: dict[str, int]) -> dict[str, Any]:
    """What `layercut plan` says of this run, from the config alone."""
    config = PlanConfig(
        load=ModelConfig(device=str(device)),
        text=DataConfig(tokens=amounts["tokens"], window=WINDOW),
        search=SearchConfig(ratio=RATIO, preserve="none"),
        heal=HealConfig(tune_tokens=amounts["tune_tokens"]),
        evaluate=EvaluateConfig(eval_tokens=amounts["tokens"], eval_window=WINDOW),
    )
    with tempfile.TemporaryDirectory() as folder:
        if source is None:
            model.config.save_pretrained(folder)
        plan = plan_run(source or folder, config)
    return {name: plan[name] for name in ("machine", "stages", "seconds", "fits")}


def measured(name: str, device: torch.device, plan: dict[str, Any], work: Callable[[], Any]) -> tuple[Any, dict]:
    """What a stage gives; its seconds and its peak of device memory, beside the planned ones."""
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats(device)
    begun = time.perf_counter()
    value = work()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    facts = {"seconds": time.perf_counter() - begun, "planned_seconds": plan["stages"][name]["seconds"]}
    peak, expected = peak_device_bytes(device), plan["stages"][name]["peak_bytes"]
    return value, facts | {
        "peak_bytes": peak, "planned_peak_bytes": expected, "peak_over_plan": peak and peak / expected,
    }  # fmt: skip


def healed(
    model: Any, device: torch.device, plan: dict[str, Any], amounts: dict[str, int]
) -> tuple[Any, dict[str, Any]]:
    """Search, cut, fold and tune on random tokens; the cut model, and what each stage took."""
    size, draw = model.config.get_text_config().vocab_size, torch.Generator().manual_seed(0)

    def rows(tokens: int) -> torch.Tensor:
        return torch.randint(size, (tokens // WINDOW, WINDOW), generator=draw)

    stages: dict[str, Any] = {}
    calibration, tuning = rows(amounts["tokens"]), rows(amounts["tune_tokens"])
    found, stages["search"] = measured(
        "search", device, plan, lambda: lc.search(model, calibration, ratio=RATIO, num_segments=1)
    )
    small = lc.cut(model, found.segments)
    folded, stages["fold"] = measured("fold", device, plan, lambda: lc.fold_(small, model, calibration))
    tuned, stages["tune"] = measured("tune", device, plan, lambda: lc.tune_(small, model, tuning))
    dense, student = DecoderRunner(model), DecoderRunner(small)
    per_token = sum(operations(dense, student, endpoints(found.segments, len(dense))).values())
    rate = matrix_rate(model.dtype, device, size=amounts["square"])
    stages["search"] |= {"segments": [[s.start, s.stop] for s in found.segments]}
    stages["fold"] |= {"kl": [folded.kl_before, folded.kl_after]}
    stages["tune"] |= {
        "tokens_per_second": tuned.tokens_per_second,
        "matrix_rate_tflops": rate / 1e12,
        "floor_tokens_per_second": rate / per_token,
        "share_of_floor": tuned.tokens_per_second * per_token / rate,
    }
    return small, stages


def int4_speed(model: Any, small: Any, amounts: dict[str, int]) -> dict[str, Any]:
    """`speed` in 4 bits by torchao's kernels, on copies of both models."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    dense, cut = (in_bfloat16(each) for each in (model, small))
    for each in (dense, cut):
        quantize_(each, Int4WeightOnlyConfig(group_size=128))
    return timed(dense, cut, amounts)


def in_bfloat16(model: Any) -> Any:
    """A model of the same shape, of random weights, on the same device."""
    with model.device:
        return AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16).eval()


def timed(dense: Any, small: Any, amounts: dict[str, int]) -> dict[str, Any]:
    found = speed(dense, small, **{name: amounts[name] for name in ("prompt", "decode", "repeats")})
    return {name: found[name] for name in ("prefill", "decode", "kv_bytes_per_token")}


# --- vLLM, in processes of its own, after this one has freed the device -----------------------------------------------


def vllm_speed(configs: dict[str, Any], amounts: dict[str, int], clock: Clock) -> dict[str, Any]:
    """Prefill and decode by vLLM, of configs by "dense" and "cut" with random weights: no files are needed."""
    if importlib.util.find_spec("vllm") is None:
        raise ImportError(name="vllm")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, config in configs.items():
            config.save_pretrained(Path(folder) / name)
            command = [sys.executable, __file__, "--vllm", str(Path(folder) / name), json.dumps(amounts)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, clock.left))
            if done.returncode:
                return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
            found[name] = json.loads(done.stdout.strip().splitlines()[-1])
    ratios = {key: found["cut"][key] / found["dense"][key] for key in ("prefill", "decode")}
    return found | {"ratio": ratios}


def with_int4(config: Any, model: Any) -> Any:
    """A config of packed 4-bit weights, as layercut writes it; the model's own stays as it is."""
    packed = quantize(model, bits=4, quantizer="rtn").config
    copied = AutoConfig.for_model(**config.to_dict())
    copied.quantization_config = dict(packed)
    return copied


def run_vllm(folder: str, amounts: dict[str, int]) -> None:
    """In a process of its own: tokens a second of one row, printed as JSON."""
    from vllm import LLM, SamplingParams

    prompt, decode = amounts["prompt"], amounts["decode"]
    model = LLM(
        folder, dtype="bfloat16", load_format="dummy", skip_tokenizer_init=True, enforce_eager=True,
        max_model_len=prompt + decode + 8, max_num_seqs=4, gpu_memory_utilization=0.8, enable_prefix_caching=False,
    )  # fmt: skip

    def seconds(new: int) -> float:
        settings = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        begun = time.perf_counter()
        model.generate([{"prompt_token_ids": list(range(3, 3 + prompt))}], settings, use_tqdm=False)
        return time.perf_counter() - begun

    seconds(2)
    first = min(seconds(1) for _ in range(3))
    whole = min(seconds(1 + decode) for _ in range(3))
    print("\n" + json.dumps({"prefill": prompt / first, "decode": decode / max(1e-9, whole - first)}))


# --- one model, and all -----------------------------------------------------------------------------------------------


def of_model(name: str, device: torch.device, amounts: dict[str, int], clock: Clock, tiny: bool) -> dict[str, Any]:
    row, configs = by_transformers(name, device, amounts, clock, tiny)
    gc.collect()  # the models are gone: vLLM takes most of the device
    if device.type != "cpu":
        torch.accelerator.empty_cache()
    row["vllm"] = {kind: clock.part(120, lambda: vllm_speed(pair, amounts, clock)) for kind, pair in configs.items()}  # noqa: B023
    return row


def by_transformers(
    name: str, device: torch.device, amounts: dict[str, int], clock: Clock, tiny: bool
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """All but vLLM's part; and the configs, dense and cut, that vLLM is asked about."""
    begun = time.perf_counter()
    model, source = made(name, device, tiny)
    row: dict[str, Any] = {
        "model": name,
        "weights": "random" if source is None else "the checkpoint's",
        "parameters": decoder_stack.parameter_count(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "made_in_seconds": time.perf_counter() - begun,
    }
    row["plan"] = plan = planned(model, source, device, amounts)
    small, row["stages"] = healed(model, device, plan, amounts)
    row["transformers"] = {
        "bfloat16": clock.part(30, lambda: timed(model, small, amounts)),
        "int4": clock.part(60, lambda: int4_speed(model, small, amounts)),
    }
    configs: dict[str, dict[str, Any]] = {"bfloat16": {"dense": model.config, "cut": small.config}}
    if importlib.util.find_spec("vllm") and importlib.util.find_spec("compressed_tensors"):
        configs["int4"] = {"dense": with_int4(model.config, model), "cut": with_int4(small.config, small)}
    return row, configs


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=None)
    parser.add_argument("--seconds", type=float, default=480.0)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    device = loading.pick_device(args.device)
    if device.type == "cpu" and not args.tiny:
        print("error: this machine has no accelerator", "hint: --tiny tries this file out", sep="\n", file=sys.stderr)
        return 2
    kind = "cpu" if device.type == "cpu" else torch.get_device_module(device).get_device_name(device.index or 0)
    clock, amounts = Clock(args.seconds), TINY_AMOUNTS if args.tiny else AMOUNTS
    rows: list[dict[str, Any]] = []
    slug = ("tiny-" if args.tiny else "") + re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")
    for name in args.models or (["8b"] if args.tiny else ["8b", "7b", "smollm2"]):
        rows.append(
            {"model": name} | clock.part(60, lambda: of_model(name, device, amounts, clock, args.tiny))  # noqa: B023
        )
        content = {
            "claim": " ".join(__doc__.split("\n\n")[0].split()), "device": kind, "tiny": args.tiny, "ratio": RATIO,
            "window": WINDOW, "amounts": amounts, "rows": rows, "environment": environment(),
        }  # fmt: skip
        write_json(args.out or RESULTS / f"gpu-{slug}.json", named(content))  # after each model
        print(json.dumps(rows[-1], indent=1), flush=True)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--vllm"]:
        run_vllm(sys.argv[2], json.loads(sys.argv[3]))
    else:
        sys.exit(main(sys.argv[1:]))
