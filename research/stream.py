"""A model larger than memory is searched from its checkpoint on disk, each weight read once.

Writes a checkpoint of random bfloat16 weights in the shape of a known model (about 16 GB for llama-3-8b), prices
every segment of `--ratio` of its layers in a fresh process that leaves the layers on disk, and records that process's
peak memory, the bytes it read, its seconds and the size of the streams. Small shapes are searched in memory as well,
in another fresh process, and both must find the same prices to the bit. The checkpoint is deleted at the end.

    python research/stream.py --shape llama-3-8b
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import common
from layercut import layer_search
from layercut.layer_search.sweep import DENSE, all_segments, streams_held
from layercut.models import checkpoints, layer_reader, loading, placement
from layercut.models.runner import DecoderRunner
from layercut.segments import layers_to_remove

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0, "max_position_embeddings": 8192,
    },
    "llama-3.2-1b": {
        "num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0, "max_position_embeddings": 8192,
    },
    "small": {
        "num_hidden_layers": 24, "hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 8192, "max_position_embeddings": 2048,
    },
}  # fmt: skip
SHARD_BYTES = 2**30
IN_MEMORY_TOO = 8 * 2**30
"""Checkpoints up to this size are searched in memory as well."""


def write_checkpoint(folder: Path, shape: dict[str, Any]) -> int:
    """A sharded checkpoint, one shard in memory at a time; its bytes.

    Matrices are normal with deviation 0.02, norms 1. To spare hours of drawing, matrices are cut out of one pool of
    2^26 draws at random places.
    """
    config = LlamaConfig(**shape, tie_word_embeddings=False, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    need = sum(2 * torch.Size(s).numel() for s in shapes.values())
    if shutil.disk_usage(folder).free < 1.1 * need:
        sys.exit(f"{folder} has {shutil.disk_usage(folder).free / 1e9:.1f} GB free, {1.1 * need / 1e9:.1f} GB needed")
    generator = torch.Generator().manual_seed(0)
    pool = (torch.randn(2**26, generator=generator) * 0.02).bfloat16()
    parts: list[list[str]] = [[]]
    size = 0
    for name in shapes:
        size += 2 * torch.Size(shapes[name]).numel()
        if parts[-1] and size > SHARD_BYTES:
            parts.append([])
            size = 2 * torch.Size(shapes[name]).numel()
        parts[-1].append(name)
    weight_map: dict[str, str] = {}
    for k, names in enumerate(parts):
        file = folder / f"model-{k + 1:05}-of-{len(parts):05}.safetensors"
        save_file({n: _draw(shapes[n], pool, generator) for n in names}, file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file.name)
        out_of_cache(file)
    index = {"metadata": {"total_size": need}, "weight_map": weight_map}
    (folder / checkpoints.INDEX).write_text(json.dumps(index))
    config.save_pretrained(folder)
    words = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))  # there has to be one; no text is read here
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return need


def _draw(shape: tuple[int, ...], pool: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    start = int(torch.randint(len(pool), (), generator=generator))
    numbers = torch.empty(torch.Size(shape).numel(), dtype=torch.bfloat16)
    done = 0
    while done < len(numbers):
        piece = pool[start : start + len(numbers) - done]
        numbers[done : done + len(piece)] = piece
        done, start = done + len(piece), 0
    return numbers.view(shape)


def out_of_cache(file: Path) -> None:
    """Have the kernel forget a file, so that reading it reads the disk."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def proc(file: str, key: str) -> int:
    """A figure of this process that the kernel keeps: /proc/self/status in kB, /proc/self/io in bytes."""
    lines = dict(line.split(":") for line in Path("/proc/self", file).read_text().splitlines())
    return int(lines[key].split()[0])


def search(folder: str, mode: str, ratio: float, rows: int, window: int) -> dict[str, Any]:
    """What one fresh process does."""
    before, begun = proc("io", "rchar"), time.perf_counter()
    imported = proc("status", "VmHWM") * 1024
    loaded = placement.load(checkpoints.resolve(folder), place="disk" if mode == "on" else "memory")
    opened = time.perf_counter()
    resident = proc("status", "VmHWM") * 1024
    stack = DecoderRunner(loaded.model)
    checked = time.perf_counter()
    vocabulary = stack.vocabulary
    tokens = torch.randint(vocabulary, (rows, window), generator=torch.Generator().manual_seed(0))
    length = layers_to_remove(ratio, len(stack))
    held = streams_held([DENSE, *((s,) for s in all_segments(length, len(stack)))], len(stack))
    result = layer_search.search(stack, tokens, n_layers=length, method="exhaustive", seed=0)
    disk: Any = layer_reader.layers_on_disk(loaded.model)  # it counts what it reads, and none needs that
    return {
        "layers": mode.replace("on", "on disk").replace("off", "in memory"),
        "peak_rss_bytes": proc("status", "VmHWM") * 1024,
        "rss_after_imports": imported,
        "peak_rss_after_opening": resident,
        "weight_bytes": sum(p.numel() * p.element_size() for p in loaded.model.parameters()),
        "weight_bytes_read": disk.files.bytes_read if disk else None,
        "times_each_layer_was_read": sorted(set(disk.files.layers_read)) if disk else None,
        "bytes_by_read_calls": proc("io", "rchar") - before,
        "seconds": {
            "open": round(opened - begun, 1),
            "check": round(checked - opened, 1),
            "search": round(result.seconds, 1),
        },
        "streams": held,
        "streams_bytes": held * stack.stream_bytes(tokens.numel()),
        "layer_forwards": result.cost.layer_forwards,
        "found": [[s.start, s.stop] for s in result.segments],
        "candidates": len(result.candidates),
        "prices": [candidate.kl for candidate in result.candidates],
    }


def fresh(*arguments: Any) -> dict[str, Any]:
    """`search` in a process of its own."""
    command = [sys.executable, __file__, "--child", json.dumps(arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    args = common.arguments(
        __doc__.splitlines()[0], shape="llama-3-8b", ratio=0.2, rows=4, window=32, folder=tempfile.gettempdir()
    )
    with tempfile.TemporaryDirectory(prefix="layercut-stream-", dir=args.folder) as place:
        begun = time.perf_counter()
        size = write_checkpoint(Path(place), SHAPES[args.shape])
        written = time.perf_counter() - begun
        print(f"{size / 1e9:.2f} GB written in {written:.0f} s", file=sys.stderr)
        modes = ["on", "off"] if size <= IN_MEMORY_TOO else ["on"]
        rows = [fresh(place, mode, args.ratio, args.rows, args.window) for mode in modes]
    prices = [row.pop("prices") for row in rows]
    checkpoint = checkpoints.Checkpoint(f"random weights, shape of {args.shape}", Path(args.shape))
    common.finish(
        args.out,
        loading.LanguageModel(None, None, checkpoint, torch.bfloat16, torch.device("cpu")),
        "exhaustive search from disk: each weight read once, memory far below the model's size",
        rows,
        shape=SHAPES[args.shape],
        checkpoint_bytes=size,
        tokens={"rows": args.rows, "window": args.window, "source": "random ids"},
        same_prices_in_memory=prices[0] == prices[1] if len(prices) > 1 else None,
        threads=torch.get_num_threads(),
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(search(*json.loads(sys.argv[2]))))
    else:
        main()
