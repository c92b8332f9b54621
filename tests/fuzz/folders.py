"""Checkpoint folders spoiled at random, by a seed: every way in must end well or in a LayercutError, and soon.

    python -m tests.fuzz.folders --cases 500 --seed 0

Of a small sound folder one file is changed (a value, a key, bytes, or a thing of another kind in its place); then it is
planned, cut, loaded and run, whole and with its layers on disk. A case is its number: `--only N` runs one again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import transformers
from safetensors.torch import load_file, save_file

import folders
import tiny
from layercut.cli import single_stage
from layercut.config import CutConfig, PlanConfig, SearchConfig
from layercut.errors import LayercutError
from layercut.models import config_files, decoder_stack, layer_reader, loading
from layercut.models.checkpoints import resolve
from layercut.plan import plan_run

SECONDS = 10.0
"""A case may take, on each way in."""


class Slow(BaseException):
    """A case took longer than it may. No Exception, so that no reader takes it for damage."""


# --- sound folders ------------------------------------------------------------------------------------------


def write_sound(folder: Path) -> list[Path]:
    """The folders that cases start from: three architectures, and one in shards."""
    shared = {
        "vocab_size": folders.VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2,
        "num_key_value_heads": 1, "num_hidden_layers": 4, "max_position_embeddings": 64, "bos_token_id": 0,
        "eos_token_id": 1, "pad_token_id": 1, "head_dim": 8,
    }  # fmt: skip
    by_other_names = {
        "vocab_size": folders.VOCABULARY, "n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 64,
        "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    experts = {
        "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "decoder_sparse_step": 2,
        "shared_expert_intermediate_size": 8, "mlp_only_layers": [],
    }  # fmt: skip
    configs = {
        "llama": transformers.LlamaConfig(**shared),
        "gpt2": transformers.GPT2Config(**by_other_names),
        "qwen2_moe": transformers.Qwen2MoeConfig(**shared, **experts),
        "gemma3_text": transformers.Gemma3TextConfig(**shared, sliding_window=8),
    }
    made = []
    for name, config in configs.items():
        tiny.tiny(config).save_pretrained(folder / name)
        folders.tokenizer().save_pretrained(folder / name)
        made.append(folder / name)
    made.append(_in_shards(folder / "llama", folder / "shards"))
    return made


def _in_shards(whole: Path, folder: Path) -> Path:
    shutil.copytree(whole, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {key: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, key in enumerate(sorted(weights))}
    for name in set(names.values()):
        save_file({k: w for k, w in weights.items() if names[k] == name}, folder / name, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


# --- what is done to them -----------------------------------------------------------------------------------

VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 7, 10**5, 10**9, 2**31, 2**63, 10**30, 1.5, -1e300, float("nan"), float("inf"),
    "", "text", "9", "\ud800", "\x1b[31m", "../x", "a" * 10_000, [], [1], [None], [0, 1, 2, 3], ["text"] * 4,
    [10**9] * 4, {}, {"a": 1}, {"3": {}}, {"rope_type": "yarn", "factor": 0}, {"rope_type": "text"},
]  # fmt: skip
KEYS = [
    *config_files.COUNTS, *config_files.SIZES, *config_files.EXPERTS, *config_files.TOKENS, "num_labels",
    "id2label", "architectures", "model_type", "dtype", "torch_dtype", "attn_implementation", "_attn_implementation",
    "experts_implementation", "original_layer_index", "layer_types", "quantization_config", "auto_map", "text_config",
    "rope_parameters", "rope_scaling", "sliding_window", "hidden_act", "per_layer_config", "transformers_weights",
    "tie_word_embeddings", "is_encoder_decoder", "pruned_heads", "output_attentions", "_name_or_path",
    "transformers_version", "sub_configs", "mlp_only_layers", "decoder_sparse_step", "rms_norm_eps",
]  # fmt: skip
TOKENIZER_KEYS = [
    "model_max_length", "tokenizer_class", "added_tokens_decoder", "chat_template", "bos_token", "eos_token",
    "auto_map", "additional_special_tokens", "padding_side", "clean_up_tokenization_spaces", "unk_token", "backend",
    "extra_special_tokens", "model_input_names", "add_prefix_space", "split_special_tokens", "fix_mistral_regex",
]  # fmt: skip


def spoil(folder: Path, draw: random.Random) -> str:
    """Change one file of a folder; what was done, in words."""
    jsons = sorted(file.name for file in folder.glob("*.json"))
    name = draw.choice(["config.json"] * 8 + jsons * 2 + ["header"] * 3)
    if name == "header":
        file = draw.choice(sorted(folder.glob("*.safetensors")))
        return f"{file.name}: {_spoil_header(file, draw)}"
    file, way = folder / name, draw.random()
    if way < 0.1:
        return f"{name}: {_replace(file, draw)}"
    if way < 0.2:
        file.write_bytes(_spoil_bytes(file.read_bytes(), draw))
        return f"{name}: bytes"
    content = json.loads(file.read_text())
    keys = {"config.json": KEYS, "tokenizer_config.json": TOKENIZER_KEYS}.get(name, ["weight_map", "metadata"])
    words = [_change(content, keys, draw) for _ in range(draw.choice([1, 1, 1, 2]))]
    file.write_text(json.dumps(content))
    return f"{name}: {', '.join(words)}"


def _change(content: dict[str, Any], keys: list[str], draw: random.Random) -> str:
    """Change a value in a JSON object or in one of those in it, add one, or take one away."""
    where: Any = content
    while inner := [v for v in where.values() if isinstance(v, dict) and v]:
        if draw.random() < 0.7:
            break
        where = draw.choice(inner)
    way, key = draw.random(), draw.choice(list(where) or ["x"])
    if way < 0.1:
        where.pop(key, None)
        return f"without {key}"
    if way < 0.55:
        key = draw.choice(keys)
    value = draw.choice(VALUES) if draw.random() < 0.97 else json.loads("[" * 500 + "]" * 500)
    where[key] = value
    return f"{key} = {value!r}"[:100]


def _spoil_bytes(raw: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(raw) + 1)
    return draw.choice([
        raw[:place], raw[:place] + bytes([draw.randrange(256)]) + raw[place + 1 :], raw[:place] + raw[place:] * 2,
        b"[" * 100_000, b'{"num_hidden_layers": ' + b"9" * 5000 + b"}", b"\xef\xbb\xbf" + raw, b"null", b"[]", b"{}",
    ])  # fmt: skip


def _replace(file: Path, draw: random.Random) -> str:
    """A thing of another kind in the place of a file."""
    file.unlink()
    kind = draw.choice(["nothing", "folder", "pipe", "loop", "dangling link", "device", "empty"])
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind != "nothing":
        file.symlink_to({"loop": file.name, "dangling link": "nowhere", "device": "/dev/zero"}[kind])
    return kind


def _spoil_header(file: Path, draw: random.Random) -> str:
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    way = draw.choice(["bytes", "length", "value", "data", "name", "shape"])
    if way == "bytes":
        file.write_bytes(_spoil_bytes(raw, draw))
        return way
    if way == "length":
        file.write_bytes(struct.pack("<Q", draw.choice([0, 1, length - 1, length + 8, 2**31, 2**63])) + raw[8:])
        return way
    names = [name for name in header if name != "__metadata__"]
    name = draw.choice(names)
    if way == "value":
        key, value = draw.choice(["dtype", "shape", "data_offsets"]), draw.choice([*VALUES, [0, 0], [2**62, 4]])
        header[name][key] = value
    elif way == "name":
        other = draw.choice([*names, "", "model.layers.\u00b2.x", "model.layers.99999999999.x", "\x1b[31m"])
        header[other] = header.pop(name)
    elif way == "shape":
        header[name]["shape"] = [1, *header[name]["shape"]]
    else:
        data = data[: draw.randrange(len(data))]
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return f"{way} of {name}"


# --- the ways in --------------------------------------------------------------------------------------------


def load_and_run(folder: Path, out: Path, *, on_disk: bool = False) -> None:
    checkpoint = resolve(str(folder))
    checkpoint.fingerprint()
    loaded = (layer_reader.open_on_disk if on_disk else loading.load)(checkpoint, device="cpu")
    tokens = torch.tensor([loaded.tokenizer("some text").input_ids])
    decoder_stack.check_tokens(tokens, loaded.model.config, checkpoint.name)
    with torch.no_grad():
        loaded.model(input_ids=tokens, use_cache=False)


def cut(folder: Path, out: Path) -> None:
    single_stage.cut(str(folder), CutConfig(segment=("1:2",), out=out))


def plan(folder: Path, out: Path) -> None:
    plan_run(str(folder), PlanConfig(search=SearchConfig(ratio=0.25), calibrate=False))


WAYS: dict[str, Callable[[Path, Path], None]] = {
    "plan": plan,
    "cut": cut,
    "load": load_and_run,
    "stream": lambda folder, out: load_and_run(folder, out, on_disk=True),
}


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Slow, raised after so many seconds."""

    def stop(*_: object) -> None:
        raise Slow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def failures(sound: list[Path], scratch: Path, seed: int, number: int) -> list[str]:
    """What went wrong in one case, in words; empty where every way in ended well or in a LayercutError."""
    draw = random.Random(f"{seed} {number}")
    folder, out = scratch / "case", scratch / "out"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(draw.choice(sound), folder)
    words, found = spoil(folder, draw), []
    for way, enter in WAYS.items():
        shutil.rmtree(out, ignore_errors=True)
        try:
            with limited(SECONDS):
                enter(folder, out)
        except LayercutError:
            pass
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            found.append(f"{number} {words}\n  {way}: {''.join(traceback.format_exception(error)[-3:])}"[:600])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, default=None)
    asked = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        sound = write_sound(Path(scratch) / "sound")
        numbers = range(asked.cases) if asked.only is None else [asked.only]
        found = [words for number in numbers for words in failures(sound, Path(scratch), asked.seed, number)]
    print("\n".join(found), f"{len(found)} failures", sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
