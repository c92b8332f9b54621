"""The healings that endpoint tuning is put beside: the same start, tokens, order, loss, optimizer and schedule.

Each gives the student parameters to train (LoRA through peft) and is trained by `train_`: KL to the dense model,
float32 masters, weights rounded to the format they are saved in, AdamW, the best state by held-out loss. What is below
the first trained layer is the dense model's own and runs once and without gradients here too, and logits live piece by
piece by the same code, so that seconds and memory compare methods and not programs; "lora-autograd" is LoRA as one
writes it down, both models whole and autograd through all of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from layercut.healing.endpoint_tuning import own_parameters_
from layercut.healing.inputs import Batch, Rows
from layercut.healing.least_squares import RIDGES
from layercut.healing.lora import adapters_
from layercut.healing.normal_equations import HELD_OUT, Normal
from layercut.healing.recipe import warmup_then_cosine
from layercut.healing.tuning_pass import HeldOut, Pair, loss_gradient
from layercut.models.losses import KL
from layercut.models.memory import reuse_freed
from layercut.models.runner import DecoderRunner, common_prefix, hidden_of, replaced_hidden
from layercut.segments import Segment

PASS_TOKENS = 1024
"""Tokens of one forward and backward; a step adds up as many as its batch has."""

Prepared = tuple[list[nn.Parameter], int]
"""What is trained, and the first layer in which something is; layers below may still have been folded."""


def endpoint_lora_(student: DecoderRunner, segment: Segment) -> Prepared:
    """LoRA on all linear modules of layers s - 1 and e."""
    return _lora_(student, [segment.start - 1, segment.start]), segment.start - 1


def lora_(student: DecoderRunner, segment: Segment) -> Prepared:
    """LoRA on all linear modules of all layers."""
    return _lora_(student, list(range(len(student)))), 0


def last_three_and_head_(student: DecoderRunner, segment: Segment) -> Prepared:
    """The last three layers and a head of its own, untied from the embeddings (2411.15558)."""
    first = len(student) - 3
    head = student.model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    trained = [*own_parameters_(student, range(first, len(student))), head.weight]
    return trained, first


def full_(student: DecoderRunner, segment: Segment) -> Prepared:
    """Everything; tied weights stay tied."""
    own: dict[int, nn.Parameter] = {}
    for module in student.model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in own:
                own[id(parameter)] = nn.Parameter(parameter.detach().clone())
            setattr(module, name, own[id(parameter)])
    return list(own.values()), 0


BASELINES: dict[str, tuple[Callable[[DecoderRunner, Segment], Prepared], tuple[float, float, float]]] = {
    "endpoint-lora": (endpoint_lora_, (5e-4, 1.5e-3, 4e-3)),
    "lora": (lora_, (3e-4, 1e-3, 3e-3)),
    "lora-mix": (lora_, (3e-4, 1e-3, 3e-3)),
    "lora-autograd": (lora_, (3e-4, 1e-3, 3e-3)),
    "last-3-head": (last_three_and_head_, (1e-4, 3e-4, 1e-3)),
    "full": (full_, (5e-5, 1.5e-4, 4e-4)),
}
"""Each with the learning rates that are tried."""


def _lora_(student: DecoderRunner, positions: Sequence[int]) -> list[nn.Parameter]:
    adapters = adapters_([student.layers[position] for position in positions])
    for adapter in adapters:
        adapter.requires_grad_(True)
    return adapters


def train_(
    dense: DecoderRunner,
    student: DecoderRunner,
    trained: list[nn.Parameter],
    prefix: int,
    tokens: torch.Tensor,
    heldout: torch.Tensor,
    rate: float,
    batch_tokens: int,
    mix: float = 0.0,
    autograd: bool = False,
) -> dict[str, Any]:
    """KL to the dense model on tokens [N, T] in their order; the student is left in its best state by held-out loss.

    prefix: how many layers, from the first, are the dense model's own and stay so. mix: share of the next-token loss.
    autograd: both models run whole, on float32 logits (without a mixture).
    """
    reuse_freed()
    pair = Pair(dense=dense, student=student, prefix=prefix, objective=KL(mix=mix))
    masters = [p.detach().float().clone() for p in trained]
    optimizer = torch.optim.AdamW(masters, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    batches = tokens.split(max(1, batch_tokens // tokens.shape[1]))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_then_cosine(step, len(batches)))
    judge = HeldOut(pair, Rows(tokens=heldout), rows=max(1, PASS_TOKENS // heldout.shape[1]))
    curve, best = [], judged(judge)
    scores = [{"step": 0, "tokens": 0, "loss": best}]
    best_state = [p.detach().clone() for p in trained]
    seen, seconds, cpu_seconds = 0, 0.0, 0.0
    for step, batch in enumerate(batches, start=1):
        begun, cpu = time.perf_counter(), time.process_time()
        loss = 0.0
        for rows in batch.split(max(1, PASS_TOKENS // batch.shape[1])):
            weight = rows.numel() / batch.numel()
            loss += autograd_(dense.model, student.model, rows, weight) if autograd else backward_(pair, rows, weight)
        with torch.no_grad():
            for master, p in zip(masters, trained, strict=True):
                master.grad = torch.zeros_like(master) if p.grad is None else p.grad.float()
                p.grad = None
            nn.utils.clip_grad_norm_(masters, 1.0)
            optimizer.step()
            for master, p in zip(masters, trained, strict=True):
                p.copy_(master.to(student.stored_dtype))
        schedule.step()
        seconds += time.perf_counter() - begun
        cpu_seconds += time.process_time() - cpu
        seen += batch.numel()
        spent = {"seconds": round(seconds, 2), "cpu_seconds": round(cpu_seconds, 2)}
        curve.append({"step": step, "tokens": seen, "loss": loss, **spent})
        if step % max(1, len(batches) // 8) == 0 or step == len(batches):
            scores.append({"step": step, "tokens": seen, "loss": judged(judge)})
            if scores[-1]["loss"] < best:
                best, best_state = scores[-1]["loss"], [p.detach().clone() for p in trained]
    with torch.no_grad():
        for p, value in zip(trained, best_state, strict=True):
            p.copy_(value)
    return {
        "tokens": seen,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "trained_parameters": sum(p.numel() for p in trained),
        "curve": curve,
        "heldout": scores,
    }


def backward_(pair: Pair, tokens: torch.Tensor, weight: float) -> float:
    """Add the gradient of weight x the mean KL over tokens [B, T] to what is trained; that loss."""
    rows = torch.arange(len(tokens))
    batch = Batch(tokens, rows, torch.zeros_like(rows), weight=weight)
    if pair.prefix:
        return sum(loss.sum().item() for loss in pair.backward([batch]))
    with torch.no_grad():
        hidden, calls = pair.dense.enter(tokens)
        final = pair.dense.run(hidden, calls, 0, len(pair.dense))
    hidden, calls = pair.student.enter(tokens)  # by embeddings of its own, where these are trained
    out = pair.student.run(hidden, calls, 0, len(pair.student))
    loss, gradient = loss_gradient(pair, batch, out, final)
    out.backward(gradient)
    return loss.sum().item()


def autograd_(dense: nn.Module, student: nn.Module, tokens: torch.Tensor, weight: float = 1.0) -> float:
    """The same by autograd alone, of models that are called as they are."""
    with torch.no_grad():
        log_p = F.log_softmax(dense(input_ids=tokens, use_cache=False).logits.float(), -1)
    log_q = F.log_softmax(student(input_ids=tokens, use_cache=False).logits.float(), -1)
    loss = F.kl_div(log_q.flatten(0, 1), log_p.flatten(0, 1), log_target=True, reduction="batchmean") * weight
    loss.backward()
    return loss.item()


@torch.no_grad()
def judged(judge: HeldOut) -> float:
    """Its score; with nothing shared by the student's own embeddings, which may be trained."""
    if judge.pair.prefix == 0:
        judge.groups = [
            [replace(rows, shared=judge.pair.student.enter(rows.tokens)[0]) for rows in group] for group in judge.groups
        ]
    return judge.score()["loss"]


@torch.no_grad()
def patch_(dense: DecoderRunner, student: DecoderRunner, segment: Segment, tokens: torch.Tensor) -> None:
    """A square matrix on the whole stream at the cut, by least squares (after 2605.15491): needs code at load time."""
    layer, width = student.layers[segment.start - 1], student.hidden_size
    fit, check = (Normal.zeros(width, width, student.device) for _ in range(2))
    seen = 0
    for batch in tokens.split(8):
        h, calls, _ = common_prefix(dense, student, batch, segment.start)
        y = dense.run(h, calls, segment.start, segment.stop).float() - h.float()
        held = torch.arange(seen, seen + len(batch)) % HELD_OUT == HELD_OUT - 1
        fit.add_(h[~held], y[~held])
        check.add_(h[held], y[held])
        seen += len(batch)
    x = fit.solve_best(RIDGES, check)[1].float()
    run = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = run(*args, **kwargs)
        h = hidden_of(out)
        return replaced_hidden(out, (h.float() + h.float() @ x).to(h.dtype))

    layer.forward = forward
