"""Cut a large sharded checkpoint on disk: peak memory, and time against `cp -r` of the kept bytes.

    python research/cut_disk.py [--layers 32] [--runs 3] [--work FOLDER]

Writes a Llama checkpoint of random bfloat16 weights (4.6 GB at 32 layers), cuts a fifth of it in its own
process, copies the result with `cp -r`, in turn, and writes research/results/cut_disk.json. Peak memory is
the largest resident set; the time is that of the whole process, imports included, and of the call alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "research" / "results" / "cut_disk.json"
HIDDEN, FFN, VOCAB = 2048, 8192, 32000

CHILD = """
import json, sys, time
from pathlib import Path
started = time.monotonic()
from layercut.surgery import cut_checkpoint
from layercut.segments import Segment
imported = time.monotonic()
cut_checkpoint(Path(sys.argv[1]), [Segment.parse(sys.argv[2])], Path(sys.argv[3]))
done = time.monotonic()
status = Path("/proc/self/status").read_text()  # getrusage would count what the parent held when it forked
peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
print(json.dumps({"call_seconds": done - imported, "peak_rss_bytes": peak}))
"""


def make(folder: Path, layers: int) -> int:
    """Write the checkpoint, about a gigabyte a shard; returns the bytes of its weights."""
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=16, vocab_size=VOCAB, tie_word_embeddings=False, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in transformers.LlamaForCausalLM(config).state_dict().items()}
    groups: list[list[str]] = [[]]
    for name in shapes:
        if sum(shapes[n].numel() for n in groups[-1]) * 2 > 1e9:
            groups.append([])
        groups[-1].append(name)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file({n: torch.randn(shapes[n], dtype=torch.bfloat16) * 0.02 for n in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    total = sum(shape.numel() * 2 for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def timed(command: list[str], env: dict[str, str] | None = None) -> tuple[float, str]:
    os.sync()
    started = time.monotonic()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
    return time.monotonic() - started, done.stdout


def main() -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--work", type=Path, default=None, help="where to put 15 GB for a while")
    args = parser.parse_args()
    segment = f"{args.layers // 2}:{args.layers // 2 + args.layers // 5}"
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        source, out, copy = (Path(work) / name for name in ("source", "out", "copy"))
        source.mkdir()
        total = make(source, args.layers)
        runs = []
        for _ in range(args.runs):
            whole, text = timed([sys.executable, "-c", CHILD, str(source), segment, str(out)], env)
            cp, _ = timed(["cp", "-r", str(out), str(copy)])
            kept = sum(p.stat().st_size for p in out.glob("*.safetensors"))
            runs.append({**json.loads(text), "process_seconds": whole, "cp_seconds": cp})
            print(runs[-1], flush=True)
            shutil.rmtree(out)
            shutil.rmtree(copy)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "layers": args.layers,
        "segment": segment,
        "source_bytes": total,
        "kept_bytes": kept,
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
        "ratio_call_to_cp": statistics.median(run["call_seconds"] / run["cp_seconds"] for run in runs),
        "ratio_process_to_cp": statistics.median(run["process_seconds"] / run["cp_seconds"] for run in runs),
        "runs": runs,
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "runs"}, indent=1))


if __name__ == "__main__":
    main()
