"""Rows of tokens through a model: in as few passes as memory allows, and what is computed from them over the whole set.

In memory a batch is a pass. Where layers are on disk all batches go through a layer before the next one, so that each
is read once; where weights are sharded over processes, all of them take as many steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from layercut.distributed import processes, sharding
from layercut.errors import ModelError
from layercut.files.sizes import size
from layercut.models.decoder_stack import find_decoder
from layercut.models.losses import Teacher, as_price
from layercut.models.memory import available_bytes
from layercut.models.runner import Calls, DecoderRunner

STREAMS_SHARE = 0.5
"""Hidden states may take this share of the available memory; beyond it, rows go in several passes. A guess."""


def passes(stack: DecoderRunner, tokens: torch.Tensor, rows: int, streams: int) -> list[list[torch.Tensor]]:
    """Tokens as batches, grouped by pass through the stack.

    In memory a batch is a pass, since another pass costs nothing. On disk all batches go in one pass, so that each
    layer is read once; where the hidden states of all rows would not fit, in as few as possible. What they take is
    logged.
    """
    if not len(tokens):
        return []
    fit = rows_at_once(stack, tokens.shape[1], streams)
    if not stack.on_disk:
        return [[batch] for batch in tokens.split(min(rows, fit))]
    groups = [list(group.split(rows)) for group in tokens.split(fit)]
    say_passes(stack, min(fit, len(tokens)) * tokens.shape[1], streams, len(groups))
    return groups


def passes_in_step(
    stack: DecoderRunner, tokens: torch.Tensor, rows: int, streams: int
) -> list[tuple[list[torch.Tensor], bool]]:
    """`passes` of this process's share of the rows, as many on every process."""
    mine = passes(stack, tokens[processes.share(len(tokens))], rows, streams)
    return sharding.in_step(stack.model, mine, [tokens[:1]])


def rows_at_once(stack: DecoderRunner, window: int, streams: int) -> int:
    """Rows of tokens whose hidden states fit in memory."""
    return max(1, int(STREAMS_SHARE * available_bytes(stack.device)) // (streams * stack.stream_bytes(window)))


def say_passes(stack: DecoderRunner, tokens: int, streams: int, times: int) -> None:
    """Say what the hidden states of one pass take, and how often layers on disk are read."""
    if stack.on_disk:
        taken = size(streams * stack.stream_bytes(tokens))
        often = f"layers are read {times} time{'s'[: times > 1]}"
        stack.on_disk.say_once(f"{streams} hidden states of {tokens:,} tokens, {taken}; {often}")


def shared_passes(stack: DecoderRunner, tokens: torch.Tensor, rows: int, streams: int) -> list[list[slice]]:
    """This process's batches of rows, as slices; grouped by pass as in `passes`."""
    parts = processes.share_of_batches(len(tokens), rows)
    if not stack.on_disk:
        return [[part] for part in parts]
    window = tokens.shape[1]
    together = max(1, rows_at_once(stack, window, streams) // rows)
    groups = [parts[i : i + together] for i in range(0, len(parts), together)]
    say_passes(stack, max(sum(len(tokens[part]) for part in group) for group in groups) * window, streams, len(groups))
    return groups


def enter_all(stack: DecoderRunner, batches: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[Calls]]:
    """`DecoderRunner.enter` of several batches."""
    found = [stack.enter(batch) for batch in batches]
    return [hidden for hidden, _ in found], [calls for _, calls in found]


def carry_(stack: DecoderRunner, hidden: list[torch.Tensor], calls: Sequence[Calls], start: int, stop: int) -> None:
    """Replace h_start of several batches by h_stop; layers outermost: each is entered once for all."""
    for i in range(start, stop):
        for b, arguments in enumerate(calls):
            hidden[b] = stack.layer(i, hidden[b], arguments)


def shared_layers(dense: DecoderRunner, student: DecoderRunner) -> int:
    """How many layers, from the first, are the very same weights in both models, embeddings included.

    Found by identity, since after several rounds of cutting and healing no position shows it: below a new cut there
    may be layers that were trained at an old one.
    """

    def weights(module: nn.Module) -> list[int]:
        return [id(tensor) for tensor in (*module.parameters(), *module.buffers())]

    def below(stack: DecoderRunner) -> list[int]:
        """All that is not in a layer; a head of its own counts too, to be safe."""
        inside = {id(tensor) for layer in stack.layers for tensor in layer.parameters()}
        return [id(tensor) for tensor in stack.model.parameters() if id(tensor) not in inside]

    if below(dense) != below(student):
        return 0
    pairs = zip(dense.layers, student.layers, strict=False)
    same = [weights(one) == weights(other) for one, other in pairs]
    return same.index(False) if False in same else len(same)


def common_prefix(
    dense: DecoderRunner, student: DecoderRunner, tokens: torch.Tensor, prefix: int
) -> tuple[torch.Tensor, Calls, Calls]:
    """h_prefix of two models whose layers below `prefix` are the same, computed once."""
    hidden, calls = dense.enter(tokens)
    return dense.run(hidden, calls, 0, prefix), calls, student.arguments(tokens)


def teacher_of(stack: DecoderRunner, hidden: torch.Tensor, tokens: torch.Tensor) -> Teacher:
    """The dense model's predictions, prepared for comparison with any number of students."""
    return Teacher(dense_logits(stack, hidden, tokens))


def dense_logits(stack: DecoderRunner, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The dense model's logits, checked."""
    logits = stack.exit(hidden, tokens)
    finite = logits.isfinite().all(-1)
    if not finite.all():
        row = int((~finite).any(-1).nonzero()[0])
        raise not_finite(stack, tokens[row : row + 1])
    return logits


def not_finite(stack: DecoderRunner, row: torch.Tensor) -> ModelError:
    """The error for a model whose logits for a row of tokens are not finite.

    Names the weights that hold NaN or Inf, if any do, else the first layer whose output is not finite. Of weights
    that are sharded over several processes only this process's part is examined, and no layer is run, which would need
    all.
    """

    def damaged(module: nn.Module, prefix: str = "") -> list[str]:
        named = ((name, p) for name, p in module.named_parameters() if not p.is_meta)
        return [prefix + name for name, p in named if not sharding.local(p.detach()).isfinite().all()]

    number = str(stack.model.dtype).removeprefix("torch.")
    what, where = f"the model's predictions are not finite (computed in {number})", ""
    held = damaged(stack.model)
    if not sharding.is_spread(stack.model):
        prefix, first = find_decoder(stack.model).path, None
        with torch.no_grad():
            hidden, calls = stack.enter(row)
            for i in range(len(stack)):
                held += damaged(stack.loaded(i), f"{prefix}.{i}.") if stack.on_disk else []
                hidden = stack.layer(i, hidden, calls)
                first = i if first is None and not hidden.isfinite().all() else first
        where = ": the layers' outputs are, what the head makes of them is not"
        if first is not None:
            where = f": layer {first} is the first of {len(stack)}, counted from 0, whose output is not"
    if held := list(dict.fromkeys(held)):  # a layer of a copy that is on disk may have weights in memory as well
        more = f" and {len(held) - 3} more" if len(held) > 3 else ""
        words = f"{what}: {', '.join(held[:3])}{more} hold{'s' if len(held) == 1 else ''} NaN or Inf"
        return ModelError(words, "the checkpoint is damaged: fetch or convert it again")
    wider = "--dtype bfloat16 or --dtype float32" if number == "float16" else "--dtype float32"
    hint = "compute in a wider dtype: " + wider if number != "float32" else "this model cannot be used"
    return ModelError(f"{what}{where}; no weight holds NaN or Inf", hint)


@torch.no_grad()
def mean_kl(dense: DecoderRunner, student: DecoderRunner, tokens: torch.Tensor, prefix: int = 0) -> float:
    """KL(p || q) of the student's predictions. Of several processes each takes a share of the rows."""
    total, tokens = 0.0, dense.place(tokens)
    mine = shared_passes(dense, tokens, dense.budget.logit_rows(tokens.shape[1], dense.vocabulary), streams=3)
    queue = dense.parts("kl", sharding.in_step(dense.model, mine, [slice(0, 1)]))
    for part in queue:
        with queue.trying(part):
            rows, counts = part
            batches = [tokens[some] for some in rows]
            p, calls = enter_all(dense, batches)
            carry_(dense, p, calls, 0, prefix)
            q, student_calls = list(p), [student.arguments(batch) for batch in batches]
            carry_(dense, p, calls, prefix, len(dense))
            carry_(student, q, student_calls, prefix, len(student))
            found = [
                teacher_of(dense, p_hidden, batch).kl(student.exit(q_hidden, batch)).sum()
                for batch, p_hidden, q_hidden in zip(batches, p, q, strict=True)
            ]
            total += sum(torch.stack(found).tolist()) if counts else 0.0
    return as_price(processes.summed([total])[0] / tokens.numel())
