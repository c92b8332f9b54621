"""What each stage computes: layers applied to rows of tokens, and floating-point operations.

Counted with the functions that the stages themselves use, so that they cannot drift apart: the sweep's own work, the
gate's own schedule and wells, tuning's own endpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from layercut.config import CompressConfig
from layercut.estimate.shape import Parts, Shape
from layercut.evaluation import speed
from layercut.evaluation.generation import CONTINUATION, FEWEST_PROMPTS, LONGEST_PROMPT, PROMPTS, SAMPLE
from layercut.export.checkpoint import CHECK_TOKENS
from layercut.healing.endpoint_tuning import SCORES, endpoints
from layercut.healing.least_squares import HELD_OUT, RIDGES, WIDEST
from layercut.layer_search.clp import COARSE_SHARE, schedule_for
from layercut.layer_search.prices import FINALISTS, FIRST_SHARE
from layercut.layer_search.sweep import DENSE, all_segments, set_work, sweep_work
from layercut.pipeline.stages.heal import FOLD_TOKENS, objective
from layercut.pipeline.stages.text import FEWEST_HELD_OUT, HELD_OUT_SHARE
from layercut.registries import criteria
from layercut.segments import Segment, joined_segments

FRESH_PROCESS = 8.0
"""Seconds until a new process has imported torch and transformers: a guess between warm and cold disks."""

HELD_OUT_SCORES = 1 + SCORES
"""Tuning looks at the held-out rows before the first step and so often on its way."""


@dataclass(frozen=True)
class Bounds:
    """A number that depends on what the search finds: what it is if places stay where they start, and its limits."""

    expected: float
    least: float
    most: float

    @classmethod
    def exactly(cls, value: float) -> Bounds:
        return cls(value, value, value)

    def __add__(self, other: Bounds) -> Bounds:
        return Bounds(self.expected + other.expected, self.least + other.least, self.most + other.most)

    def __mul__(self, factor: float) -> Bounds:
        return Bounds(self.expected * factor, self.least * factor, self.most * factor)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one stage spends. One layer applied to one row counts one, as in `result.Cost`."""

    layer_forwards: Bounds = field(default_factory=lambda: Bounds.exactly(0))
    layer_backwards: Bounds = field(default_factory=lambda: Bounds.exactly(0))
    head_rows: float = 0
    """Rows of logits made and compared."""
    head_backward_rows: float = 0
    flops: float = 0
    """In the model's number format, of layers and head."""
    flops64: float = 0
    """In float64."""
    read_bytes: float = 0
    """From and to the disk."""
    moved_bytes: float = 0
    """Copied through memory, where that and not arithmetic is what takes the time."""
    decoded_bytes: float = 0
    """Weights read by tokens that are generated one by one."""
    decoded_layers: float = 0
    """Layers called for them."""
    fixed_seconds: float = 0
    """What takes its time on any machine, roughly."""


def rows_of(tokens: int, window: int) -> int:
    """N, rows of T tokens that hold so many."""
    return -(-tokens // window)


def search_work(shape: Shape, config: CompressConfig, length: int, given: Sequence[Segment]) -> Work:
    """Of the method asked for, on all calibration rows; with --oracle the sweep on top."""
    rows = rows_of(config.text.tokens, config.text.window)
    if given:
        cuts = tuple(sorted(given))
        return _work(shape, Bounds.exactly(set_work([DENSE, cuts], shape.layers, rows)), heads=2 * rows)
    method = config.search.method
    found = METHODS[method](shape.layers, length, rows, shape)
    if config.search.oracle and method != "exhaustive":
        found = _sum(shape, found, exhaustive_work(shape.layers, length, rows, shape))
    return found


def exhaustive_work(layers: int, length: int, rows: int, shape: Shape) -> Work:
    """Exact: L for the dense stream and L - stop for each of the L - n + 1 forks, times the rows."""
    segments = all_segments(length, layers)
    return _work(shape, Bounds.exactly(sweep_work(segments, layers, rows)), heads=rows * (len(segments) + 1))


def clp_work(layers: int, length: int, rows: int, shape: Shape) -> Work:
    """Coarse pricing, descent and race for one segment (`layer_search/clp.py`); the last two depend on the descent."""
    schedule = schedule_for(layers, length, 1, rows)
    few = min(rows, max(2, rows // FIRST_SHARE))
    everything = all_segments(length, layers)
    looked = Bounds.exactly(sweep_work(everything, layers, few))
    entered = descent_entered(layers, length, schedule.particles) * schedule.steps
    raced, more = race_work(layers, length, few, rows, schedule.particles)
    heads = few * (len(everything) + 1) + schedule.steps * (schedule.particles + 1)
    return _work(
        shape, looked + entered + Bounds.exactly(schedule.steps * layers) + raced, entered, heads=heads + more,
        heads_back=schedule.steps * schedule.particles,
    )  # fmt: skip


def descent_entered(layers: int, length: int, particles: int) -> Bounds:
    """Layers that P gated streams enter in one step: those behind the segment, and up to four at its soft walls.

    A segment at the stack's end leaves none, one at its beginning all that are kept; on average it is half of them.
    """
    kept = layers - length
    return Bounds(particles * (kept / 2 + 2), 0, particles * min(layers, kept + 4))


def race_work(layers: int, length: int, few: int, rows: int, particles: int) -> tuple[Bounds, float]:
    """(layer-forwards, rows of logits) of `prices.race` among the better half of the coarse pricing and the ends.

    A row that was priced is not priced again; each round halves what is alive and doubles the rows.
    """
    starts = layers - length + 1
    alive = min(starts, -(-starts // COARSE_SHARE) + particles)
    most_alive = min(starts, alive + 4 * particles)  # ends and their neighbours that are not in that half
    total, heads, priced, seen = Bounds.exactly(0), 0, few, min(rows, 2 * few)
    while True:
        new = seen - priced
        kept = layers - length
        total += Bounds(
            new * (layers + alive * kept / 2),
            new * (layers + sum(range(min(FINALISTS, starts)))),
            new * (layers + sum(kept - start for start in range(most_alive))),
        )
        heads += new * (alive + 1)
        if seen == rows:
            return total, heads
        alive, most_alive = (min(starts, max(FINALISTS, -(-n // 2))) for n in (alive, most_alive))
        priced, seen = seen, min(rows, 2 * seen)


def _priced_pick(layers: int, length: int, rows: int) -> Bounds:
    """A baseline's pick is priced by one real cut, somewhere."""
    ends = [set_work([DENSE, (Segment(s, s + length),)], layers, rows) for s in (0, layers - length)]
    return Bounds(sum(ends) / 2, min(ends), max(ends))


def _one_pass(forwards: int, backwards: int) -> Callable[..., Work]:
    """Methods that look at the dense model once: so many passes forwards and backwards."""

    def work(layers: int, length: int, rows: int, shape: Shape) -> Work:
        passes = Bounds.exactly(forwards * layers * rows) + _priced_pick(layers, length, rows)
        return _work(
            shape, passes, Bounds.exactly(backwards * layers * rows), heads=(2 + backwards) * rows,
            heads_back=backwards * rows, trained=True,
        )  # fmt: skip

    return work


def _each_layer(layers: int, length: int, rows: int, shape: Shape) -> Work:
    """Shortened LLaMA: the model without each layer in turn."""
    work = set_work([(Segment(i, i + 1),) for i in range(layers)], layers, rows)
    return _work(shape, Bounds.exactly(work) + _priced_pick(layers, length, rows), heads=rows * (layers + 2))


def _sleb(layers: int, length: int, rows: int, shape: Shape) -> Work:
    """Each round prices every layer that is left; expected: the layers go one by one from the middle."""
    total, heads = 0, 0
    first = (layers - length) // 2
    for step in range(length):
        removed = set(range(first, first + step))
        sets = [joined_segments(removed | {i}) for i in range(layers) if i not in removed]
        total, heads = total + set_work(sets, layers, rows), heads + rows * len(sets)
    most = rows * sum((layers - k) * (layers - 1 - k) for k in range(length))
    return _work(shape, Bounds(total, 0, most) + _priced_pick(layers, length, rows), heads=heads)


METHODS: dict[str, Callable[[int, int, int, Shape], Work]] = {
    "clp": clp_work,
    "exhaustive": exhaustive_work,
    "random": _one_pass(0, 0),
    "reverse-order": _one_pass(0, 0),
    "block-influence": _one_pass(1, 0),
    "angular": _one_pass(1, 0),
    "cosine": _one_pass(1, 0),
    "perplexity": _each_layer,
    "taylor": _one_pass(2, 1),
    "sleb": _sleb,
}
"""Methods whose work can be told beforehand; evolution's depends on the sets it draws, and what a criterion of another
package computes is not known here."""


def unknown_search(method: str) -> str | None:
    """What to say about the search by a criterion that layercut does not have itself; None for its own."""
    if method in criteria.own:
        return None
    return (
        f"What the criterion {method!r} computes and holds is unknown: its time is not counted, "
        "its memory is taken as the exhaustive search's."
    )


def fold_work(shape: Shape, config: CompressConfig, segment: Segment) -> Work:
    """For each of the systems: the dense stream as far as the cut, the layer before it once more, the normal
    equations, which are solved in float64 once for each ridge and once more. And two looks at the held-out rows."""
    rows, held = fold_rows(config), rows_of(held_out_tokens(config), config.text.window)
    kept, d = shape.layers - len(segment), shape.hidden
    systems = fold_systems(shape)
    streams = len(systems) * rows * (segment.stop + 1) + 2 * held * (shape.layers + kept)
    solves = len(RIDGES) + 1 if rows >= HELD_OUT else 1
    # of I unknowns an LU factorisation 2/3 I^3, solving for D right-hand sides 2 I^2 D, the solution's error 2 I^2 D
    solving = sum(solves * (2 / 3 * i**3 + 4 * i**2 * d) for i in systems)
    adding = sum(2 * rows * shape.window * i * (i + d) for i in systems)
    found = _work(shape, Bounds.exactly(streams), heads=4 * held)
    return replace(found, flops64=solving + adding)


def fold_rows(config: CompressConfig) -> int:
    """Rows that the fold's statistics are of (`RunContext.fold_tokens`)."""
    more = min(config.heal.tune_tokens, max(0, FOLD_TOKENS - config.text.tokens))
    return rows_of(config.text.tokens, config.text.window) + more // config.text.window


def fold_systems(shape: Shape) -> tuple[int, int]:
    """Unknowns I of the two least-squares problems: both projections together, where that is not too wide, and the
    MLP's again."""
    first, last = shape.read
    return first + last if first + last <= WIDEST else first, last


def tune_work(shape: Shape, config: CompressConfig, segment: Segment) -> Work:
    """Every row: the dense model forwards, the student from the first trained layer on forwards and backwards."""
    heal, window = config.heal, config.text.window
    rows, held = rows_of(heal.tune_tokens, window), rows_of(held_out_tokens(config), window)
    trained = endpoints([segment], shape.layers, heal.radius)
    kept = shape.layers - len(segment)
    suffix = kept - min(trained)
    minimised = objective(heal)
    logits, judge = minimised.reads == "logits", minimised.judge()
    if not logits:
        suffix = max(trained) + 1 - min(trained)
    dense = suffix + min(trained) + len(segment) if minimised.needs_dense else min(trained)
    scored = shape.layers + kept - min(trained) if judge.needs_dense else kept
    forwards = rows * (dense + suffix) + HELD_OUT_SCORES * held * scored
    heads = rows * (1 + minimised.needs_dense) if logits else 0
    heads += HELD_OUT_SCORES * held * (1 + judge.needs_dense)
    back = rows if logits else 0
    found = _work(shape, Bounds.exactly(forwards), Bounds.exactly(rows * suffix), heads=heads, heads_back=back)
    mean = (shape.total("flops_trained") - shape.total("flops_backward")) / shape.layers
    return replace(found, flops=found.flops + rows * len(trained) * mean)


def evaluate_work(shape: Shape, config: CompressConfig, segment: Segment, weights: tuple[int, int]) -> Work:
    """Perplexity of the dense, cut, folded and tuned states; generations, their health, speed. weights: bytes before
    and after.

    Both models write after three prompts and, for their health, after eight at once, which the dense one then scores;
    each round of `speed.speed` fills a prompt and decodes, twice with the dense model. A decoded token, or eight at
    once, reads every weight.
    """
    rows = rows_of(config.evaluate.eval_tokens, shape.window)
    kept = shape.layers - len(segment)
    after = 1 + config.heal.fold + bool(config.heal.tune_tokens)
    written = FEWEST_PROMPTS * (LONGEST_PROMPT + CONTINUATION) / shape.window
    forwards, heads = rows * (shape.layers + after * kept) + 2 * written * shape.layers, rows * (1 + after)
    decoded = [len(PROMPTS) * SAMPLE + CONTINUATION] * 2
    if config.evaluate.speed:
        rounds = 1 + speed.REPEATS
        forwards += rounds * speed.PROMPT / shape.window * (2 * shape.layers + kept)
        steps = rounds * speed.DECODE
        decoded = [decoded[0] + 2 * steps, decoded[1] + steps]
    found = _work(shape, Bounds.exactly(forwards), heads=heads + 2 * written)
    return replace(
        found,
        decoded_bytes=sum(count * size for count, size in zip(decoded, weights, strict=True)),
        decoded_layers=decoded[0] * shape.layers + decoded[1] * kept,
    )


def export_work(shape: Shape, config: CompressConfig, after: Parts, after_bytes: int) -> Work:
    """Written once, read once by the fresh process, which generates 24 tokens in float32 with the cache; perplexity of
    both, of which float32 counts as two of the model's format where that is narrower."""
    wide = 4 * after.total
    rows = rows_of(min(CHECK_TOKENS, config.evaluate.eval_tokens), shape.window)
    times = 1 + max(1, 4 // shape.itemsize)
    found = _work(shape, Bounds.exactly(times * rows * len(after.layers)), heads=times * rows)
    return replace(
        found, read_bytes=2 * after_bytes, moved_bytes=wide + 5 * after_bytes, decoded_bytes=24 * wide,
        decoded_layers=24 * len(after.layers), fixed_seconds=FRESH_PROCESS,
    )  # fmt: skip


def load_work(stored: int, weights: int) -> Work:
    """Read from disk, and copied once into memory."""
    return Work(read_bytes=stored, moved_bytes=2 * weights)


def held_out_tokens(config: CompressConfig) -> int:
    """As the text stage draws them."""
    return max(FEWEST_HELD_OUT, config.heal.tune_tokens // HELD_OUT_SHARE)


def _work(
    shape: Shape,
    forwards: Bounds,
    backwards: Bounds | None = None,
    *,
    heads: float,
    heads_back: float = 0,
    trained: bool = False,
) -> Work:
    """Counts as operations, by the mean layer; a head's backward through frozen weights costs its forward."""
    backwards = backwards or Bounds.exactly(0)
    back = "flops_trained" if trained else "flops_backward"
    flops = (forwards.expected * shape.total("flops") + backwards.expected * shape.total(back)) / shape.layers
    return Work(
        layer_forwards=forwards,
        layer_backwards=backwards,
        head_rows=heads,
        head_backward_rows=heads_back,
        flops=flops + (heads + heads_back) * shape.head_flops,
    )


def _sum(shape: Shape, a: Work, b: Work) -> Work:
    return Work(
        layer_forwards=a.layer_forwards + b.layer_forwards,
        layer_backwards=a.layer_backwards + b.layer_backwards,
        head_rows=a.head_rows + b.head_rows,
        head_backward_rows=a.head_backward_rows + b.head_backward_rows,
        flops=a.flops + b.flops,
    )
