"""Seeded damage to a tiny .gguf file, and what reads it: each case ends well or in a LayercutError, soon and in bounds.

python -m tests.fuzz.gguf --cases 2000 --seed 0
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import folders
import tiny
from fuzz.folders import Slow, limited
from gguf_writer import write_gguf
from layercut.errors import LayercutError
from layercut.models import checkpoints, loading
from layercut.models.gguf_header import read_header
from layercut.segments import Segment
from layercut.surgery import cut_gguf

SECONDS, ROOM = 20, 1 << 30
"""Of a case: seconds, and bytes of address space beyond what the process has."""
NUMBERS = [0, 1, 2, 7, 9, 31, 255, 1 << 15, 1 << 31, 1 << 40, *((1 << n) - 1 for n in (31, 32, 63, 64))]


def seed_file(folder: Path) -> Path:
    """A sound file of four layers."""
    model = tiny.llama(4, vocab_size=folders.VOCABULARY, bos_token_id=0, eos_token_id=1)
    return write_gguf(model, folders.tokenizer(), folder / "seed.gguf")


def mutated(sound: bytes, header: int, draw: random.Random) -> bytes:
    """One to three changes: mostly in the header [0, header), where every number and name of the file stands."""
    data = bytearray(sound)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        # half of the header is the vocabulary: the front and the tensors' names weigh more
        low, high = draw.choice([(0, 1200), (header - 2600, header), (0, header)])
        at = draw.randrange(low, high - 8)
        match draw.randrange(8):
            case 0:
                data[at] ^= 1 << draw.randrange(8)
            case 1:
                data[at] = draw.randrange(256)
            case 2:
                data[at : at + 4] = (draw.choice(NUMBERS) % (1 << 32)).to_bytes(4, "little")
            case 3:
                data[at : at + 8] = draw.choice(NUMBERS).to_bytes(8, "little")
            case 4:
                del data[at : at + draw.choice([1, 4, 8, 40])]
            case 5:
                data[at:at] = data[at : at + draw.choice([1, 4, 8, 40])]
            case 6:
                del data[draw.randrange(len(data)) :]
            case 7:
                _rename(data, draw)
        if len(data) < header:
            break
    return bytes(data)


WORDS = [b"blk.", b"llama.", b"tokenizer.", b"weight", b"block_count", b"head_count", b"general.", b"llama"]
PLACES = ["\u00b2", "\u0663", "-1", "99", "1e9", "+1"]


def _rename(data: bytearray, draw: random.Random) -> None:
    """Other words in names of the same length, and places in the stack that are none."""
    word = draw.choice(WORDS)
    found = [i for i in range(len(data)) if data.startswith(word, i)] if draw.random() < 0.5 else []
    if found:
        at = draw.choice(found)
        data[at : at + len(word)] = bytes(draw.randrange(32, 256) for _ in word)
    elif (at := data.find(b"blk.2.ffn_up.weight")) >= 8:
        name = f"blk.{draw.choice(PLACES)}.ffn_up.weight".encode()
        data[at - 8 : at + 19] = len(name).to_bytes(8, "little") + name


@contextmanager
def bounded(seconds: float = SECONDS, room: int = ROOM) -> Iterator[None]:
    """Slow after `seconds`, MemoryError beyond `room` bytes more than now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room, hard))
    try:
        with limited(seconds):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def cut(file: Path) -> None:
    out = file.with_name("cut.gguf")
    cut_gguf(file, [Segment(1, 2)], out, force=True)
    read_header(out)  # what is written can be read


def load(file: Path) -> None:
    loading.load(checkpoints.resolve(str(file)), dtype="float32", device="cpu")


def outcome(read: Callable[[Path], None], file: Path) -> str:
    """ "ok", "refused", or what else happened."""
    try:
        with bounded():
            read(file)
    except LayercutError as error:
        return "refused" if error.message and error.hint else f"no hint: {error}"
    except Slow:
        return f"more than {SECONDS} s"
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return "".join(traceback.format_exception(error)[-3:])
    return "ok"


def campaign(folder: Path, cases: int, seed: int, loads: float = 0.25) -> tuple[dict[str, int], list[str]]:
    """Counts of outcomes, and what went wrong. loads: the share of cases that transformers is given as well."""
    from gguf import GGUFReader

    source = seed_file(folder)
    sound, header = source.read_bytes(), GGUFReader(source).data_offset
    counts, wrong = {"ok": 0, "refused": 0}, []
    for case in range(cases):
        draw = random.Random(f"{seed}/{case}")
        file = folder / "case.gguf"
        file.write_bytes(mutated(sound, header, draw))
        for read in (cut, load) if draw.random() < loads else (cut,):
            found = outcome(read, file)
            if found in counts:
                counts[found] += 1
            else:
                wrong.append(f"seed {seed} case {case} {read.__name__}: {found}")
    return counts, wrong


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--loads", type=float, default=0.25)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts, wrong = campaign(Path(folder), args.cases, args.seed, args.loads)
    print("\n".join(wrong[:40]))
    print(f"{args.cases} files, {counts}, {len(wrong)} wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
