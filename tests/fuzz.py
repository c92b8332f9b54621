"""Checkpoints damaged at random, by a seed: every way in must end well or in a LayercutError, soon and in bounds.

    python -m tests.fuzz --cases 200 --seed 0

Of a small sound folder one file is changed (a value, a key, bytes, or a thing of another kind in its place), of a small
.gguf file a few bytes, mostly of its header; then it is planned, cut, loaded and run. A case is its number: `--only N`
runs one again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
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

sys.path.insert(0, str(Path(__file__).parent))

import torch
import transformers
from safetensors.torch import load_file, save_file

import folders
import tiny
from layercut.cli import single_stage
from layercut.config import SearchConfig
from layercut.config.commands import CutConfig, PlanConfig
from layercut.errors import LayercutError
from layercut.models import config_files, decoder_stack, layer_reader, loading
from layercut.models.checkpoints import resolve
from layercut.models.gguf_header import read_header
from layercut.plan import plan_run
from layercut.segments import Segment
from layercut.surgery import cut_gguf

SECONDS, ROOM = 20, 1 << 30
"""Of a case: seconds, and of a .gguf file bytes of address space beyond what the process has."""


class Slow(BaseException):
    """A case took longer than it may. No Exception, so that no reader takes it for damage."""


@contextmanager
def bounded(seconds: float = SECONDS, room: int | None = None) -> Iterator[None]:
    """Slow after `seconds`, MemoryError beyond `room` bytes more than now."""

    def stop(*_: object) -> None:
        raise Slow

    before, (soft, hard) = signal.signal(signal.SIGALRM, stop), resource.getrlimit(resource.RLIMIT_AS)
    if room is not None and sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room, hard))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# --- sound ones ---


def sound_folders(folder: Path) -> list[Path]:
    """The folders that cases start from: three architectures, and one in shards."""
    shared = {
        "vocab_size": folders.VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2,
        "num_key_value_heads": 1, "num_hidden_layers": 4, "max_position_embeddings": 64, "bos_token_id": 0,
        "eos_token_id": 1, "pad_token_id": 1, "head_dim": 8,
    }  # fmt: skip
    by_other_names = {"n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 1}
    experts = {
        "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "decoder_sparse_step": 2,
        "shared_expert_intermediate_size": 8, "mlp_only_layers": [],
    }  # fmt: skip
    for config in (
        transformers.LlamaConfig(**shared), transformers.Qwen2MoeConfig(**shared, **experts),
        transformers.GPT2Config(vocab_size=folders.VOCABULARY, **by_other_names),
        transformers.Gemma3TextConfig(**shared, sliding_window=8),
    ):  # fmt: skip
        tiny.tiny(config).save_pretrained(folder / config.model_type)
        folders.tokenizer().save_pretrained(folder / config.model_type)
    parts = shutil.copytree(folder / "llama", folder / "shards")
    weights = load_file(parts / "model.safetensors")
    (parts / "model.safetensors").unlink()
    names = {key: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, key in enumerate(sorted(weights))}
    for name in set(names.values()):
        save_file({k: w for k, w in weights.items() if names[k] == name}, parts / name, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (parts / "model.safetensors.index.json").write_text(json.dumps(index))
    return sorted(folder.iterdir())


def sound_gguf(folder: Path) -> Path:
    from gguf_writer import write_gguf

    model = tiny.llama(4, vocab_size=folders.VOCABULARY, bos_token_id=0, eos_token_id=1)
    return write_gguf(model, folders.tokenizer(), folder / "sound.gguf")


# --- what is done to them ---

VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 7, 10**5, 10**9, 2**31, 2**63, 10**30, 1.5, -1e300, float("nan"), float("inf"),
    "", "text", "9", "\ud800", "\x1b[31m", "../x", "a" * 10_000, [], [1], [None], [0, 1, 2, 3], ["text"] * 4,
    [10**9] * 4, {}, {"a": 1}, {"3": {}}, {"rope_type": "yarn", "factor": 0}, {"rope_type": "text"},
]  # fmt: skip
KEYS = {
    "config.json": [
        *config_files.COUNTS, *config_files.SIZES, *config_files.EXPERTS, *config_files.TOKENS, *config_files.NAMED,
        *config_files.OPEN, "num_labels", "id2label", "architectures", "model_type", "original_layer_index",
        "layer_types", "auto_map", "text_config", "rope_parameters", "rope_scaling", "sliding_window", "hidden_act",
        "transformers_weights", "tie_word_embeddings", "is_encoder_decoder", "output_attentions", "_name_or_path",
        "transformers_version", "sub_configs", "mlp_only_layers", "rms_norm_eps",
    ],
    "tokenizer_config.json": [
        "model_max_length", "tokenizer_class", "added_tokens_decoder", "chat_template", "bos_token", "eos_token",
        "auto_map", "additional_special_tokens", "padding_side", "unk_token", "backend", "extra_special_tokens",
        "model_input_names", "add_prefix_space", "split_special_tokens", "fix_mistral_regex",
    ],
}  # fmt: skip


def spoil(folder: Path, draw: random.Random) -> str:
    """Change one file of a folder; what was done, in words."""
    jsons = sorted(file.name for file in folder.glob("*.json"))
    name = draw.choice(["config.json"] * 8 + jsons * 2 + ["header"] * 3)
    if name == "header":
        file = draw.choice(sorted(folder.glob("*.safetensors")))
        return f"{file.name}: {_spoil_header(file, draw)}"
    file, way = folder / name, draw.random()
    if way < 0.1:  # a thing of another kind in its place
        file.unlink()
        kind = draw.choice(["nothing", "folder", "pipe", "loop", "dangling link", "device", "empty"])
        links = {"loop": file.name, "dangling link": "nowhere", "device": "/dev/zero"}
        makers = {"folder": file.mkdir, "pipe": lambda: os.mkfifo(file), "empty": file.touch, "nothing": lambda: None}
        makers.get(kind, lambda: file.symlink_to(links[kind]))()
        return f"{name}: {kind}"
    if way < 0.2:
        file.write_bytes(_spoil_bytes(file.read_bytes(), draw))
        return f"{name}: bytes"
    content, words = json.loads(file.read_text()), []
    for _ in range(draw.choice([1, 1, 1, 2])):  # a value in the object or in one of those in it
        where: Any = content
        while (inner := [v for v in where.values() if isinstance(v, dict) and v]) and draw.random() > 0.7:
            where = draw.choice(inner)
        way, key = draw.random(), draw.choice(list(where) or ["x"])
        if way < 0.1:
            where.pop(key, None)
            words.append(f"without {key}")
            continue
        key = draw.choice(KEYS.get(name, ["weight_map", "metadata"])) if way < 0.55 else key
        where[key] = draw.choice(VALUES) if draw.random() < 0.97 else json.loads("[" * 500 + "]" * 500)
        words.append(f"{key} = {where[key]!r}"[:100])
    file.write_text(json.dumps(content))
    return f"{name}: {', '.join(words)}"


def _spoil_bytes(raw: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(raw) + 1)
    return draw.choice([
        raw[:place], raw[:place] + bytes([draw.randrange(256)]) + raw[place + 1 :], raw[:place] + raw[place:] * 2,
        b"[" * 100_000, b'{"num_hidden_layers": ' + b"9" * 5000 + b"}", b"\xef\xbb\xbf" + raw, b"null", b"[]", b"{}",
    ])  # fmt: skip


def _spoil_header(file: Path, draw: random.Random) -> str:
    """Of a safetensors file."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    way, name = draw.choice(["bytes", "length", "value", "data", "name", "shape"]), draw.choice(names)
    if way == "value":
        key, value = draw.choice(["dtype", "shape", "data_offsets"]), draw.choice([*VALUES, [0, 0], [2**62, 4]])
        header[name][key] = value
    elif way == "name":
        other = draw.choice([*names, "", "model.layers.\u00b2.x", "model.layers.99999999999.x", "\x1b[31m"])
        header[other] = header.pop(name)
    elif way == "shape":
        header[name]["shape"] = [1, *header[name]["shape"]]
    text = json.dumps(header).encode()
    spoilt = struct.pack("<Q", len(text)) + text + (data[: draw.randrange(len(data))] if way == "data" else data)
    if way == "bytes":
        spoilt = _spoil_bytes(raw, draw)
    elif way == "length":
        spoilt = struct.pack("<Q", draw.choice([0, 1, length - 1, length + 8, 2**31, 2**63])) + raw[8:]
    file.write_bytes(spoilt)
    return f"{way} of {name}"


NUMBERS = [0, 1, 2, 7, 9, 31, 255, 1 << 15, 1 << 31, 1 << 40, *((1 << n) - 1 for n in (31, 32, 63, 64))]
WORDS = [b"blk.", b"llama.", b"tokenizer.", b"weight", b"block_count", b"head_count", b"general.", b"llama"]


def mutated(sound: bytes, header: int, draw: random.Random) -> bytes:
    """One to three changes: mostly in the header [0, header), where every number and name of a .gguf file stands."""
    data = bytearray(sound)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        # half of the header is the vocabulary: the front and the tensors' names weigh more
        low, high = draw.choice([(0, 1200), (header - 2600, header), (0, header)])
        at, way = draw.randrange(low, high - 8), draw.randrange(8)
        if way < 2:
            data[at] = data[at] ^ 1 << draw.randrange(8) if way else draw.randrange(256)
        elif way < 4:
            width = 4 * (way - 1)
            data[at : at + width] = (draw.choice(NUMBERS) % (1 << 8 * width)).to_bytes(width, "little")
        elif way == 4:
            del data[at : at + draw.choice([1, 4, 8, 40])]
        elif way == 5:
            data[at:at] = data[at : at + draw.choice([1, 4, 8, 40])]
        elif way == 6:
            del data[draw.randrange(len(data)) :]
        elif draw.random() < 0.5:  # another word in a name, of the same length
            word = draw.choice(WORDS)
            if found := [i for i in range(len(data)) if data.startswith(word, i)]:
                at = draw.choice(found)
                data[at : at + len(word)] = bytes(draw.randrange(32, 256) for _ in word)
        elif (at := data.find(b"blk.2.ffn_up.weight")) >= 8:  # a place in the stack that is none
            place = draw.choice(["\u00b2", "\u0663", "-1", "99", "1e9", "+1"])
            name = f"blk.{place}.ffn_up.weight".encode()
            data[at - 8 : at + 19] = len(name).to_bytes(8, "little") + name
        if len(data) < header:
            break
    return bytes(data)


# --- the ways in ---


def load(path: Path, out: Path, *, on_disk: bool = False) -> None:
    checkpoint = resolve(str(path))
    checkpoint.fingerprint()
    loaded = (layer_reader.open_on_disk if on_disk else loading.load)(checkpoint, dtype="float32", device="cpu")
    tokens = torch.tensor([loaded.tokenizer("some text").input_ids])
    decoder_stack.check_tokens(tokens, loaded.model.config, checkpoint.name)
    with torch.no_grad():
        loaded.model(input_ids=tokens, use_cache=False)


def cut(file: Path, out: Path) -> None:
    cut_gguf(file, [Segment(1, 2)], out, force=True)
    read_header(out)  # what is written can be read


WAYS: dict[str, Callable[[Path, Path], None]] = {
    "plan": lambda folder, _: plan_run(str(folder), PlanConfig(search=SearchConfig(ratio=0.25), calibrate=False)),
    "cut": lambda folder, out: single_stage.cut(str(folder), CutConfig(segment=("1:2",), out=out)), "load": load,
    "stream": lambda folder, out: load(folder, out, on_disk=True),
}  # fmt: skip


def outcome(enter: Callable[[Path, Path], None], path: Path, out: Path, room: int | None = None) -> str:
    """ "ok", "refused", or what else happened."""
    shutil.rmtree(out, ignore_errors=True)
    try:
        with bounded(room=room):
            enter(path, out)
    except LayercutError as error:
        return "refused" if error.message and error.hint else f"no hint: {error}"
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return "".join(traceback.format_exception(error)[-3:])[:600]
    return "ok"


def of_folder(sound: list[Path], scratch: Path, draw: random.Random) -> list[str]:
    """How each way into a spoilt folder ends."""
    shutil.rmtree(scratch / "case", ignore_errors=True)
    words = spoil(shutil.copytree(draw.choice(sound), scratch / "case"), draw)
    found = [(way, outcome(enter, scratch / "case", scratch / "out")) for way, enter in WAYS.items()]
    return [end if end in ("ok", "refused") else f"{words}, {way}: {end}" for way, end in found]


def of_gguf(sound: Path, scratch: Path, draw: random.Random) -> list[str]:
    """How cutting a spoilt file ends, and in some cases loading it."""
    from gguf import GGUFReader

    file, reader = scratch / "case.gguf", GGUFReader(sound)
    file.write_bytes(mutated(sound.read_bytes(), reader.data_offset, draw))
    return [outcome(way, file, scratch / "out.gguf", ROOM) for way in ((cut, load) if draw.random() < 0.1 else (cut,))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=200, help="folders; ten times as many .gguf files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, default=None)
    asked = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    wrong = []
    with tempfile.TemporaryDirectory() as name:
        (scratch := Path(name) / "cases").mkdir()
        (Path(name) / "sound").mkdir()
        file, sound = sound_gguf(Path(name)), sound_folders(Path(name) / "sound")
        for number in range(10 * asked.cases) if asked.only is None else [asked.only]:
            draw = random.Random(f"{asked.seed} {number}")
            ends = of_gguf(file, scratch, draw) + (of_folder(sound, scratch, draw) if number < asked.cases else [])
            wrong += [f"{number} {end}" for end in ends if end not in ("ok", "refused")]
    print("\n".join(wrong), f"{len(wrong)} failures", sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
