"""Memory of this machine, this process and its accelerator, in bytes, and how much of it one pass may take.

The largest tensors, logits [B, T, V] and hidden states [B, T, D], are made a few rows at a time, so that each stays
within the `Budget` of its device. Where memory runs out all the same, work goes on in smaller parts:

    with memory_limit(None):               # opened by the run, and by public functions
        for part in (parts := ShrinkingParts("search", work, device)):
            with parts.trying(part):
                ...                        # a part that runs out of memory comes again, as two halves
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import psutil
import torch

from layercut import progress
from layercut.distributed import processes
from layercut.errors import ModelError
from layercut.files import parse_bytes

Part = TypeVar("Part", bound=Any)
CGROUP = Path("/sys/fs/cgroup")  # limits of a container, as seen from inside (cgroup v2)

# --- what there is ---


def available_bytes(device: torch.device) -> int:
    """Memory that can still be allocated: an accelerator's, with what torch keeps for reuse, or the machine's.

    The latter without swapping, within a container's limit, shared evenly by the processes on it, within their own
    limits (`ulimit -v`, `ulimit -d`).
    """
    most = most_bytes()
    if device.type != "cpu":
        with contextlib.suppress(RuntimeError, NotImplementedError, AttributeError):  # some backends do not count
            used, kept = torch.accelerator.memory_allocated(device), torch.accelerator.memory_reserved(device)
            free = torch.accelerator.get_memory_info(device)[0] + kept - used
            return max(0, free if most is None else min(free, most - used))
    info = psutil.virtual_memory(), psutil.Process().memory_info()
    free = info[0].available
    with contextlib.suppress(OSError, ValueError, KeyError):
        cache = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        used = int((CGROUP / "memory.current").read_text()) - int(cache["inactive_file"])
        free = min(free, int((CGROUP / "memory.max").read_text()) - used)  # "max" where there is none
    free //= processes.on_this_machine()
    for limit, taken in ((resource.RLIMIT_AS, info[1].vms), (resource.RLIMIT_DATA, getattr(info[1], "data", 0))):
        if (allowed := resource.getrlimit(limit)[0]) != resource.RLIM_INFINITY:
            free = min(free, max(0, allowed - taken))
    return free if most is None else min(free, max(0, most - resident_bytes()))


def resident_bytes() -> int:
    """What this process holds now: Python and its libraries, as in any run."""
    return int(psutil.Process().memory_info().rss)


def whole_bytes(device: torch.device) -> int:
    """All memory that a device has, used or not, within a container's limit and `memory_limit`'s: always the same."""
    found = [int(psutil.virtual_memory().total)]
    with contextlib.suppress(OSError, ValueError):
        found.append(int((CGROUP / "memory.max").read_text()))
    if device.type != "cpu":
        with contextlib.suppress(RuntimeError, NotImplementedError, AttributeError):
            found = [int(torch.accelerator.get_memory_info(device)[1])]
    return min(found) if (most := most_bytes()) is None else min(*found, most)


def release_freed() -> None:
    """Return freed memory to the system: the C library keeps it otherwise, where it has `malloc_trim` (glibc)."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def reuse_freed(most: int = 2**30) -> None:
    """From now on let glibc keep up to so many freed bytes for later allocations, also of large pieces.

    For work whose steps allocate and free the same again and again: otherwise it returns pages and has each zeroed
    again. `release_freed` still returns all.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):  # glibc, whose numbers these are
        library.mallopt(-1, most)  # M_TRIM_THRESHOLD
        library.mallopt(-3, most)  # M_MMAP_THRESHOLD: larger pieces are returned at once


# --- what one pass may take ---

CHUNK_BYTES = 128 * 2**20  # CPU: logits of a chunk of rows, in float32
PIECE_BYTES = 32 * 2**20
"""CPU: logits of a piece of a tuning pass. Above it glibc fetches memory from the system, page by page, each time."""
PASS_TOKENS = 1024
"""Tokens in one forward and backward pass: what is kept for the backward pass grows with them; speed does not."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What one pass may take on a device: bytes of logits, hidden states and activations, and rows at once."""

    logits: int
    """Bytes of a chunk of rows' logits in float32; up to five times as many are there while they are compared."""
    piece: int  # bytes of the logits of a piece of a tuning pass, in the model's format; four times as many are there
    inner: int  # bytes of logits in float32 within a piece; four times as many are there
    streams: int  # bytes of hidden states at the end of a sweep; those of one row at least
    kept: int  # bytes that a pass keeps for its way back
    rows: int  # rows that go through a layer together, at most
    swept_tokens: int  # tokens that go through a layer together, at most
    tokens: int  # the same where its inputs are recorded, or a pass keeps something for its way back
    pass_tokens: int  # tokens in a forward and backward pass: as many at least, whatever is kept for its way back
    most_rows: int = sys.maxsize  # rows of anything at once: with twice as many memory ran out

    @classmethod
    def of_cpu(cls, threads: int | None = None) -> Budget:
        """That of a CPU, by what its caches and the C library's allocator bear, as measured."""
        return cls(
            logits=CHUNK_BYTES, piece=PIECE_BYTES, inner=2**19 * (threads or torch.get_num_threads()),
            streams=512 * 2**20, kept=0, rows=8, swept_tokens=sys.maxsize, tokens=2048,
            pass_tokens=PASS_TOKENS,
        )  # fmt: skip

    @classmethod
    def of_accelerator(cls, free: int) -> Budget:
        """That of an accelerator: shares of its free memory, which leave room for what is made of them. Guesses.

        A token in a layer is reckoned with 1 MiB: in Llama 3 8B it takes 0.1 MiB. 8,192 tokens fill any of them.
        """
        share = 1 << (max(1, free).bit_length() - 1)  # a power of two, between free / 2 and free
        tokens = min(8192, max(256, share // 2**20))
        return cls(
            logits=share // 16, piece=share // 32, inner=share // 64, streams=share // 4, kept=share // 4,
            rows=tokens, swept_tokens=tokens, tokens=tokens, pass_tokens=min(PASS_TOKENS, tokens),
        )  # fmt: skip

    def least(self, other: Budget) -> Budget:
        """The smaller of both, figure by figure."""
        return Budget(**{name: min(value, getattr(other, name)) for name, value in vars(self).items()})

    def logit_rows(self, window: int, vocabulary: int) -> int:
        """Rows whose logits are had at once in float32."""
        return max(1, min(self.most_rows, self.logits // (window * vocabulary * 4)))

    def logit_tokens(self, vocabulary: int) -> int:
        """Positions of a row whose logits are had at once in float32."""
        return max(1, self.logits // (4 * vocabulary))

    def logit_pieces(self, rows: int, window: int, bytes_per_token: int) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of a [rows, window] of tokens, so that the logits of each piece fit."""
        tokens = max(1, self.piece // bytes_per_token)
        for part in slices(rows, max(1, tokens // window)):
            for columns in slices(window, min(window, tokens)):
                yield part, columns

    def float_tokens(self, vocabulary: int) -> int:
        """Tokens whose logits are in float32 at a time, within a piece."""
        return max(1, self.inner // (4 * vocabulary))

    def swept_rows(self, window: int, stream_bytes: int, streams: int) -> int:
        """Rows per batch of a sweep, which at its end holds one hidden state for each set."""
        return max(1, min(self.layer_rows(window), self.streams // (stream_bytes * streams)))

    def layer_rows(self, window: int) -> int:
        """Rows that go through a layer together, without gradients."""
        return max(1, min(self.rows, self.most_rows, self.swept_tokens // window))

    def recorded_rows(self, window: int) -> int:
        """Rows that go through a layer together where its inputs are recorded."""
        return max(1, min(self.most_rows, self.tokens // window))

    def pass_rows(self, window: int, kept_bytes: int) -> int:
        """Rows in one forward and backward pass."""
        tokens = max(self.pass_tokens, min(self.tokens, self.kept // max(1, kept_bytes)))
        return max(1, min(self.most_rows, tokens // window))


def kept_bytes(weights: Sequence[torch.Size], itemsize: int) -> int:
    """Bytes that a layer keeps of a token for a backward pass, told from its weights: twice what they read and write.

    Of experts' weights, stacked, up to eight are reckoned. On the safe side: of Llama 3 8B 2.5 times what was kept.
    """
    widths = [sum(shape[-2:]) * min(8, shape[:-2].numel()) for shape in weights if len(shape) > 1]
    return 2 * sum(widths) * itemsize


def slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


# --- limits, and what happens where memory runs out ---

OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
"""Words of the errors of devices whose own class of error is not torch's."""
MOST_HALVINGS = 16


@dataclass
class _Limits:
    most: int | None = None
    halvings: int = 0
    most_rows: int = sys.maxsize


_limits: ContextVar[_Limits | None] = ContextVar("layercut_memory", default=None)


@contextlib.contextmanager
def memory_limit(most: int | str | None = None) -> Iterator[None]:
    """While open, stages take no more memory than this on the device that computes, and remember where it ran out.

    One that is opened within another keeps the other's limit where it gives none.

    Args:
        most: bytes, or a size such as "20GB", weights included; None: what is free.

    Yields:
        Nothing.

    Raises:
        ConfigError: text that is no size.
    """
    most = parse_bytes("--max-memory", most) if isinstance(most, str) else most
    if most is None and _limits.get() is not None:
        yield
        return
    token = _limits.set(_Limits(most))
    try:
        yield
    finally:
        _limits.reset(token)


def most_bytes() -> int | None:
    """The limit of the innermost `memory_limit`; None where there is none."""
    limits = _limits.get()
    return limits.most if limits else None


def budget(device: torch.device, free: int | None = None) -> Budget:
    """What one pass may take on a device, its weights being there.

    That of a CPU is the same whatever is free, so that results are, unless a limit is given; both are halved for each
    time that memory ran out.
    """
    limits = _limits.get() or _Limits()
    if device.type != "cpu":
        found = Budget.of_accelerator(available_bytes(device) if free is None else free)
    elif limits.most is not None:
        found = Budget.of_cpu().least(Budget.of_accelerator(available_bytes(device)))
    else:
        found = Budget.of_cpu()
    if not limits.halvings:
        return found
    smaller = {name: max(1, value // 2**limits.halvings) for name, value in vars(found).items()}
    return replace(found, **smaller | {"most_rows": limits.most_rows})


def ran_out(error: BaseException) -> bool:
    """Whether an error says that a device has no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
    )


def halve_(error: BaseException, stage: str, device: torch.device, rows: int) -> None:
    """After an error that says so: halve the budget for what follows, and say it. Any other error is raised again."""
    limits = _limits.get()
    if not ran_out(error) or limits is None:
        raise error
    if limits.halvings == MOST_HALVINGS:
        window = "--batch-tokens 128 --window" if stage == "tune" else "--window"
        raise ModelError(
            f"{stage} runs out of memory on {device} even with the least that can be done at once",
            f"read the layers from disk: --place disk; or give shorter rows: {window} 128",
        ) from error
    limits.halvings += 1
    limits.most_rows = min(limits.most_rows, max(1, rows // 2))
    if device.type != "cpu":
        torch.accelerator.empty_cache()
    release_freed()
    progress.warn(stage, f"out of memory on {device}: going on with 1/{2**limits.halvings} as much at once")


class ShrinkingParts(Generic[Part]):
    """Work in parts; one that runs out of memory is taken again as two halves, by half the budget."""

    def __init__(self, stage: str, parts: Iterable[Part], device: torch.device, *, alone: bool = True) -> None:
        """alone: no other process waits for each of the parts."""
        self.stage, self.device, self.alone, self.left = stage, device, alone, deque(parts)

    def __iter__(self) -> Iterator[Part]:
        while self.left:
            yield self.left.popleft()

    @contextlib.contextmanager
    def trying(self, part: Part) -> Iterator[None]:
        """While open, work on a part, to whose results nothing was added yet when it fails."""
        try:
            yield
            return
        except (RuntimeError, MemoryError) as error:
            if not self.alone or not ran_out(error):
                raise
            failed = error.with_traceback(None)
        # out of the handler: the error's traceback would keep the part's tensors
        halve_(failed, self.stage, self.device, rows_in(part))
        self.left.extendleft(reversed(halves(part)))


def rows_in(part: Any) -> int:
    if isinstance(part, tuple):
        return rows_in(part[0])
    if isinstance(part, list):
        return sum(map(rows_in, part))
    if isinstance(part, slice):
        return int(part.stop - part.start)
    return 1 if isinstance(part, int) else len(part)


def halves(part: Any) -> list[Any]:
    """Two parts of a part, or itself where it is one row: a slice, rows [N, …], a list of these, a tuple with one."""
    if isinstance(part, tuple):
        return [(half, *part[1:]) for half in halves(part[0])]
    if isinstance(part, list):
        middle = len(part) // 2
        return [part[:middle], part[middle:]] if middle else [[half] for half in halves(part[0])]
    if isinstance(part, int):
        return [part]
    if isinstance(part, slice):
        middle = (part.start + part.stop + 1) // 2
        return [slice(part.start, middle), slice(middle, part.stop)] if middle < part.stop else [part]
    return list(part.split((len(part) + 1) // 2))


# --- what devices differ in ---


@cache
def place_of_float64(device: torch.device) -> torch.device:
    """The device itself, or the CPU where it has no float64, as Apple's GPUs."""
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return torch.device("cpu")
    return device


def placed(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device; from the CPU's memory to a GPU's by way of pinned memory, for which nothing waits."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def sum_in_float32_() -> None:
    """Have GPUs sum products of float16 and bfloat16 in float32, and not round float32 to TF32.

    Parts in float16 overflow. It costs little where memory is what a product waits for. Of the whole process: for a
    command's own, not for a library call.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
