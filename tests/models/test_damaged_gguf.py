"""A small part of the fuzzing of GGUF files; `python -m tests.fuzz` runs as many cases as asked for."""

from __future__ import annotations

import random
import struct
from collections import Counter

import pytest

pytest.importorskip("gguf")
from fuzz import ROOM, bounded, cut, load, of_gguf, outcome, sound_gguf
from layercut.errors import ModelError
from layercut.models.gguf_header import block_of, read_header


def test_damaged_files_are_cut_or_refused(tmp_path):
    sound = sound_gguf(tmp_path)
    ends = Counter(end for case in range(60) for end in of_gguf(sound, tmp_path, random.Random(f"1/{case}")))
    assert ends.keys() == {"ok", "refused"}
    assert ends["refused"] > 20


def changed(sound: bytes, after: bytes, skip: int, code: str, value: int) -> bytes:
    """`sound` with a number in the place `skip` bytes behind `after`."""
    at = sound.index(after) + len(after) + skip
    packed = struct.pack(f"<{code}", value)
    return sound[:at] + packed + sound[at + len(packed) :]


@pytest.mark.parametrize("value", [1 << 31, (1 << 32) - 1])
def test_a_count_is_bounded_by_the_files_size(tmp_path, value):
    sound, out = sound_gguf(tmp_path).read_bytes(), tmp_path / "out.gguf"
    cases = {
        "blocks": changed(sound, b"llama.block_count", 4, "I", value),
        "elements": changed(sound, b"tokenizer.ggml.tokens", 8, "Q", value),
        "keys": sound[:16] + struct.pack("<Q", value) + sound[24:],
        "tensors": sound[:8] + struct.pack("<Q", value) + sound[16:],
        "rank": changed(sound, b"token_embd.weight", 0, "I", value),
        "columns": changed(sound, b"token_embd.weight", 4, "Q", value),
    }
    for name, data in cases.items():
        file = tmp_path / f"{name}.gguf"
        file.write_bytes(data)
        with bounded(5, 1 << 27), pytest.raises(ModelError, match="corrupt"):
            read_header(file)
        assert outcome(cut, file, out, ROOM) == "refused"
    file.write_bytes(changed(sound, b"llama.embedding_length", 4, "I", value))
    assert outcome(load, file, out, ROOM) == "refused"


def test_a_layers_number_is_written_in_ascii_digits():
    assert block_of("blk.13.attn_q.weight") == 13
    for name in ("blk.².attn_q.weight", "blk.٣.attn_q.weight", "blk.03.x", "blk.-1.x", "blk.1", "output.weight"):
        assert block_of(name) is None
