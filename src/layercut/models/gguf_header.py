"""Reading a GGUF file: every number in its header is held against the file's size before anything is allocated.

The `gguf` package and transformers allocate what a header promises, so all that reads a .gguf file comes through
here first.
"""

from __future__ import annotations

import copy
import math
import re
import struct
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from layercut.errors import ModelError, first_line
from layercut.models import llama_cpp_rules as rules

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
"""GGUF value type -> struct code; 8 is a string, 9 an array."""
UINT32, BOOL, STRING, ARRAY = 4, 7, 8, 9
LARGEST_ARRAYS = 8_000_000
"""Elements of all arrays together: the `gguf` package keeps an object for each. A vocabulary of 262,144 tokens takes
2 million with its merges, scores and types."""
LARGEST_NAME, LARGEST_RANK = 65_535, 4
ALIGNMENTS = [1 << n for n in range(21)]
FETCH = "fetch this file again"
BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,8})\.(.+)", re.ASCII | re.DOTALL)
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
FINAL_NORM = {"olmo": None, "lfm2": "token_embd_norm.weight", "lfm2moe": "token_embd_norm.weight"}
"""Of architectures that name it otherwise than `output_norm.weight`, or have none; the usual name will do for all."""
UNEQUAL_BLOCKS = frozenset({"deci", "gemma3n", "gemma4", "mimo2"})
"""Architectures in which a sound block may hold some of the tensors of another and nothing else."""


class TensorPlace(NamedTuple):
    """How and where a tensor is in a file."""

    kind: int  # number of its GGML type
    start: int  # byte at which it begins
    shape: tuple[int, ...]  # the fastest dimension first


@dataclass(frozen=True)
class Header:
    """The metadata and tensor list in front of the weights of a GGUF file, all of it checked."""

    file: Path
    values: dict[str, Any]
    """Metadata by key: whole numbers, floats, bools, text, lists of them. Of arrays of text, those of a vocabulary are
    left out unless asked for."""
    tensors: dict[str, TensorPlace]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture, such as "llama" or "qwen3"."""
        if not isinstance(value := self._value("general.architecture"), str):
            raise corrupt(self.file, "general.architecture is no text")
        return value

    @property
    def blocks(self) -> int:
        """Blocks in the file, those behind the layers that predict further tokens included."""
        return self.count(f"{self.architecture}.block_count")

    @property
    def layers(self) -> int:
        """L, decoder layers: the blocks without those that predict further tokens."""
        return self.blocks - self.count(f"{self.architecture}.nextn_predict_layers", 0)

    @property
    def elements(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @cached_property
    def finer_twin(self) -> str | None:
        """Which of embeddings and head keeps more bits of a matrix that both hold; None where they are two."""
        if EMBEDDING not in self.tensors or HEAD not in self.tensors or self.architecture not in TIED_WITHOUT_HEAD:
            return None
        return _finer_twin(self.file, stamp(self.file), self.tensors[EMBEDDING], self.tensors[HEAD])

    def facts(self) -> dict[str, Any]:
        """The metadata under the architecture's name, by key without that name."""
        prefix = f"{self.architecture}."
        return {key.removeprefix(prefix): value for key, value in self.values.items() if key.startswith(prefix)}

    def count(self, key: str, default: int | None = None) -> int:
        """A metadata value that is a whole number of 0 or more."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise corrupt(self.file, f"{key} is no whole number of 0 or more")
        return value

    def _value(self, key: str, default: Any = None) -> Any:
        if (value := self.values.get(key, default)) is None:
            raise ModelError(f"{self.file} has no {key} in its metadata", "give a GGUF file of a language model")
        return value


def stamp(file: Path) -> tuple[int, ...]:
    """What changes when a file is replaced or written."""
    told = file.stat()
    return told.st_ino, told.st_size, told.st_mtime_ns, told.st_ctime_ns


def read_header(file: Path, texts: Container[str] = ()) -> Header:
    """The header of a GGUF file. texts: arrays of text to read beside those under `general.`."""
    try:
        header = _HeaderParser(file, texts).header()
    except ImportError:
        words = "reading GGUF files needs a package that is missing: gguf"
        raise ModelError(words, 'pip install "layercut[gguf]"') from None
    check_blocks(header)
    return header


@contextmanager
def quick_gguf() -> Iterator[None]:
    """While open, `gguf` slices a plain array: half a minute for 152,000 tokens is that of its memmap, by Python.

    And it makes a map of tensor names once, of which transformers asks for one per tensor.
    """
    import gguf

    class Reader(gguf.GGUFReader):
        data = property(attrgetter("_array"), lambda self, mapped: setattr(self, "_array", mapped.view(np.ndarray)))

    stock = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = Reader, cache(gguf.get_tensor_name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = stock


def open_gguf(file: Path, *, as_loaded: bool = False) -> tuple[Header, Any]:
    """A file's header and a `gguf.GGUFReader` of it; as_loaded: embeddings that are stored twice shown once."""
    header = read_header(file)
    import gguf

    try:
        with quick_gguf():
            reader = gguf.GGUFReader(file, "r")
    except Exception as error:  # the reader raises whatever its parsing runs into
        raise corrupt(file, first_line(error)) from None
    if as_loaded and (finer := header.finer_twin):
        kept = next(tensor for tensor in reader.tensors if tensor.name == finer)._replace(name=EMBEDDING)
        reader.tensors[:] = [kept if t.name == EMBEDDING else t for t in reader.tensors if t.name != HEAD]
        header = replace(header, tensors={name: place for name, place in header.tensors.items() if name != HEAD})
    return header, reader


def corrupt(file: Path, why: str) -> ModelError:
    return ModelError(f"{file} is corrupt, truncated or no GGUF file: {why}", FETCH)


def raw_value(field: Any) -> Any:
    """A metadata value of a `gguf.GGUFReader`, with text as the bytes that it is: a vocabulary need not be UTF-8."""
    if int(field.types[0]) == STRING:
        return bytes(field.parts[field.data[0]])
    if int(field.types[0]) == ARRAY and len(field.types) > 1 and int(field.types[-1]) == STRING:
        return [bytes(field.parts[i]) for i in field.data]
    return field.contents()


def block_of(tensor: str) -> int | None:
    """blk.13.attn_q.weight -> 13; None for tensors outside the blocks."""
    found = BLOCK.fullmatch(tensor)
    return int(found[1]) if found else None


def check_blocks(header: Header) -> None:
    """Refuse a file that lacks blocks or tensors which its own metadata and its other blocks call for."""
    file, name, total, layers = header.file, header.architecture, header.blocks, header.layers
    if header.count("split.count", 0) > 1:
        return  # one of several parts holds some of the blocks; the caller says what to do
    roles: dict[int, set[str]] = {}
    for tensor in header.tensors:
        if found := BLOCK.fullmatch(tensor):
            roles.setdefault(int(found[1]), set()).add(found[2])
        elif tensor.startswith("blk."):
            raise corrupt(file, f"tensor {tensor!r} names no block")
    if total > len(header.tensors) or not 0 < layers <= total:
        raise corrupt(file, f"{name}.block_count is {total:,}, and it holds {len(header.tensors):,} tensors")
    if beyond := [block for block in roles if block >= total]:
        raise corrupt(file, f"it holds a block {max(beyond)}, and {name}.block_count is {total}")
    norm = FINAL_NORM.get(name, "output_norm.weight")
    wanted = {EMBEDDING} | ({norm} if norm and "output_norm.weight" not in header.tensors else set())
    missing = sorted(wanted - header.tensors.keys()) + [f"blk.{i}.*" for i in range(layers) if i not in roles]
    kinds = {frozenset(held) for block, held in roles.items() if block < layers}
    for block, held in sorted(roles.items()) if name not in UNEQUAL_BLOCKS else ():
        # of a kind of block that the file has and of which this one holds a part
        fuller = [kind for kind in kinds if held < kind] if block < layers else []
        missing += [f"blk.{block}.{role}" for role in sorted(max(fuller, key=len) - held)] if fuller else []
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ModelError(f"{file} is incomplete: it lacks {', '.join(missing[:5])}{more}", FETCH)


class _HeaderParser:
    """Reads a header from the front. Every length is bounded by the bytes that are left."""

    def __init__(self, file: Path, texts: Container[str]) -> None:
        self.file, self.size, self.texts, self.elements = file, file.stat().st_size, texts, 0

    def header(self) -> Header:
        """ModelError: a number in the header promises more than the file holds, or what no GGUF file has."""
        with self.file.open("rb") as self.stream:
            if self.take(4) != b"GGUF":
                raise self.bad("it does not start with GGUF")
            version = self.take(4)
            self.order = "<" if version[:2] != b"\0\0" else ">"
            if (number := struct.unpack(f"{self.order}I", version)[0]) not in (2, 3):
                raise self.bad(f"version {number} is not 2 or 3")
            tensors, pairs = self.number("Q"), self.number("Q")
            if tensors * 24 + pairs * 13 > self.size:
                raise self.bad(f"it promises {tensors:,} tensors and {pairs:,} metadata keys")
            values: dict[str, Any] = {}
            for _ in range(pairs):
                name, kind = self.name(values), self.number("I")
                values[name] = self.array(name) if kind == ARRAY else self.value(name, kind)
                if name == "general.alignment" and (kind != UINT32 or values[name] not in ALIGNMENTS):
                    raise self.bad("general.alignment is no power of two")
            places = self.tensors(tensors, values.get("general.alignment", 32))
        return Header(self.file, {name: value for name, value in values.items() if value is not None}, places)

    def bad(self, why: str) -> ModelError:
        return corrupt(self.file, why)

    def left(self, count: int) -> int:
        if count > (left := self.size - self.stream.tell()):
            raise self.bad(f"{count:,} bytes are called for where {left:,} are left")
        return count

    def take(self, count: int) -> bytes:
        return self.stream.read(self.left(count))

    def number(self, code: str) -> int:
        return struct.unpack(self.order + code, self.take(struct.calcsize(code)))[0]

    def name(self, seen: Container[str]) -> str:
        if (length := self.number("Q")) > LARGEST_NAME:
            raise self.bad(f"a name of {length:,} bytes")
        try:
            name = self.take(length).decode()
        except UnicodeDecodeError:
            raise self.bad("a name that is not UTF-8") from None
        if name in seen:
            raise self.bad(f"{name!r} stands in it twice")
        return name

    def value(self, name: str, kind: int) -> Any:
        if kind == STRING:
            return self.take(self.number("Q")).decode(errors="replace")
        if kind not in SCALARS:
            raise self.bad(f"{name} is of the unknown type {kind}")
        value = self.number(SCALARS[kind])
        if kind == BOOL and value not in (0, 1):
            raise self.bad(f"{name} is neither true nor false")
        return bool(value) if kind == BOOL else value

    def array(self, name: str) -> list[Any] | None:
        kind, count = self.number("I"), self.number("Q")
        if kind != STRING and kind not in SCALARS:
            raise self.bad(f"{name} is an array of the type {kind}")
        least = 8 if kind == STRING else struct.calcsize(SCALARS[kind])
        self.elements += count
        if count * least > self.size - self.stream.tell() or self.elements > LARGEST_ARRAYS:
            raise self.bad(f"{name} promises {count:,} elements")
        if kind == STRING and (name.startswith("general.") or name in self.texts):
            return [self.value(name, STRING) for _ in range(count)]
        if kind == STRING:
            for _ in range(count):
                self.stream.seek(self.left(self.number("Q")), 1)
            return None
        items = struct.unpack(f"{self.order}{count}{SCALARS[kind]}", self.take(count * least))
        return [bool(item) for item in items] if kind == BOOL else list(items)

    def tensors(self, count: int, alignment: int) -> dict[str, TensorPlace]:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        found: dict[str, TensorPlace] = {}
        ends = []
        for _ in range(count):
            name, rank = self.name(found), self.number("I")
            if not 1 <= rank <= LARGEST_RANK:
                raise self.bad(f"tensor {name!r} has {rank:,} dimensions")
            shape = tuple(self.number("Q") for _ in range(rank))
            kind, offset = self.number("I"), self.number("Q")
            try:
                block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            except (ValueError, KeyError):
                raise self.bad(f"tensor {name!r} is of the unknown type {kind}") from None
            if 0 in shape or shape[0] % block or offset % alignment:
                raise self.bad(f"tensor {name!r} cannot have the shape {[*shape]} or start at {offset:,}")
            found[name] = TensorPlace(kind, offset, shape)
            ends.append((offset + math.prod(shape) // block * size, name))
        start = -(-self.stream.tell() // alignment) * alignment
        if ends and start + max(ends)[0] > self.size:
            raise self.bad(f"tensor {max(ends)[1]!r} ends behind the file")
        return {name: each._replace(start=start + each.start) for name, each in found.items()}


# --- tied embeddings that a file keeps twice, as the head in another rounding -----------------------------------

# Qwen2.5-Coder-0.5B in Q4_K_M has its embeddings in Q5_0 and its head in Q8_0, 4 % apart, and a fifth of the file is
# the coarser of the two: they are read as the one that they were, in the finer rounding.

TIED_WITHOUT_HEAD = frozenset({"llama", "qwen2", "qwen3"})
"""Architectures whose head llama.cpp takes from the embeddings where a file has none; each has a test."""
ERRORS = {
    "F32": 0.0, "F16": 0.0002, "BF16": 0.0017, "Q8_0": 0.0054, "Q6_K": 0.018, "Q5_1": 0.038, "Q5_K": 0.036,
    "Q5_0": 0.043, "Q4_K": 0.071, "IQ4_NL": 0.076, "Q4_1": 0.078, "Q4_0": 0.086, "Q3_K": 0.151, "Q2_K": 0.297,
}  # fmt: skip
"""By what share of its norm rounding to a GGML type moves a row of Gaussian numbers. Pairs of other types stay two."""
SLACK = 2.0  # rows of heavier tails (Student's t, 4 degrees) are moved up to 1.9 times as far
ROWS = 8192  # that are compared at once


@lru_cache(maxsize=8)
def _finer_twin(file: Path, stamp: tuple[int, ...], embedding: TensorPlace, head: TensorPlace) -> str | None:
    """Which of embeddings and head keeps more bits of a matrix that both hold, row for row."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    kinds = [GGMLQuantizationType(each.kind) for each in (embedding, head)]
    if embedding.shape != head.shape or not all(kind.name in ERRORS for kind in kinds):
        return None

    def plain(stored: TensorPlace, rows: slice) -> np.ndarray:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(stored.kind)]
        width = stored.shape[0] // block * size
        place, shape = stored.start + rows.start * width, (rows.stop - rows.start, width)
        raw = np.memmap(file, np.uint8, "r", offset=place, shape=shape)
        return quants.dequantize(np.ascontiguousarray(raw), GGMLQuantizationType(stored.kind))

    first, second = (ERRORS[kind.name] for kind in kinds)
    count, limit = math.prod(head.shape[1:]), SLACK * math.hypot(first, second)
    for begin in range(0, count, ROWS):
        rows = slice(begin, min(begin + ROWS, count))
        with np.errstate(all="ignore"):  # a file in the other order of bytes holds any numbers
            one, other = plain(embedding, rows), plain(head, rows)
            norms = np.linalg.norm(other, axis=1)
            within = np.linalg.norm(one - other, axis=1) <= limit * np.maximum(norms, 0.01 * np.median(norms))
        if not within.all():
            return None
    return EMBEDDING if first < second else HEAD


# --- the config, as transformers reads it and corrected ------------------------------------------------------------


def read_config(file: Path) -> Any:
    """The config of a .gguf file, with what llama.cpp makes of it: which layers slide, and how attention is scaled.

    Tied where the file keeps its embeddings twice.
    """
    return copy.deepcopy(_read_config(file, stamp(file)))


@lru_cache(maxsize=4)
def _read_config(file: Path, told: tuple[int, ...]) -> Any:
    """Kept until the file's stamp is another: transformers reads every token's text, seconds for 152,000 tokens."""
    from transformers import AutoConfig

    header = read_header(file)
    with quick_gguf():
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    config.tie_word_embeddings = config.tie_word_embeddings or header.finer_twin is not None
    facts, layers = header.facts(), header.layers
    if getattr(config, "num_hidden_layers", layers) != layers:
        raise corrupt(file, f"transformers reads {config.num_hidden_layers} layers of it, it has {layers}")
    full = rules.full_layers(header.architecture, facts, layers)
    listed = getattr(config, "layer_types", None)
    if full and listed and {*listed} <= {"full_attention", "sliding_attention"}:
        if len(full) != layers:
            raise corrupt(file, f"{rules.PATTERN} has {len(full)} entries for {layers} layers")
        config.layer_types = ["full_attention" if each else "sliding_attention" for each in full]
    if hasattr(config, "query_pre_attn_scalar"):
        heads, width = config.num_attention_heads, config.hidden_size
        scale = rules.attention_scale(header.architecture, width, heads, config.head_dim, layers)
        config.query_pre_attn_scalar = config.query_pre_attn_scalar if scale is None else scale
    return config
