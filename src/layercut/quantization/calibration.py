"""What is measured before weights are rounded: Hessians of their inputs, what each width costs, what each token counts.

Hessians are taken one decoder layer after another, each on what the layers before it compute once they are rounded, so
that later ones compensate the errors of earlier ones as far as they can; only one layer's are in memory.

Costs are of second order: with F the Fisher information of what the model predicts, KL(p || p_dW) = 1/2 <dW, F dW>. Of
a linear module y = W x, with d the gradient of ln p(v) in y for v drawn from p, F is taken as Kronecker product of
E[x x'] and the diagonal of E[d d'] (K-FAC, 1503.05671), so that one backward pass serves all widths:

    KL = 1/2 sum_o E[d_o^2] E[(dW_o x)^2]

The sum over the rows o of W is estimated from `ROWS` of them, drawn with probability E[d_o^2]. Of embeddings the rows
of the tokens that occur are taken, and (d, dW_t)^2 as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from layercut.models.decoder_stack import taking_gradients
from layercut.models.losses import likelihood_slope_
from layercut.models.memory import kept_bytes, place_of_float64, slices
from layercut.models.runner import DecoderRunner, intercepted
from layercut.progress import bar
from layercut.quantization.grid import decode, encode, fit_grid
from layercut.quantization.packing import Width
from layercut.quantization.quantizers import gram

TOKENS = 2048  # calibration tokens that are enough for costs: those of weights differ by orders of magnitude
ROWS = 128  # rows of a matrix that are rounded to tell what all would cost
Result = TypeVar("Result")
Weights = Mapping[str, torch.Tensor]
"""How much each calibration token counts [N, T], by the module that reads it; of others each counts 1."""


def each_with_hessian(
    stack: DecoderRunner,
    tokens: torch.Tensor,
    wanted: Mapping[int, Collection[str]],
    read: Collection[str],
    advance: Callable[..., None],
    weights: Weights = MappingProxyType({}),
) -> Iterator[tuple[int, str, torch.Tensor | None]]:
    """Weights by layer and name with their Hessians; whoever takes one rounds it before asking for the next.

    The Hessian is None of those not in `read`, and where the module did not run, as an expert to which no token was
    sent.
    """
    stream = _Stream(stack, tokens)
    for i in range(max(wanted) + 1):
        if i in wanted:
            names = [name for name in wanted[i] if name in read]
            hessians = stream.hessians(names, weights, partial(stream.layer, i)) if names else {}
            yield from ((i, name, hessians.get(name)) for name in wanted[i])
        stream.pass_(i)
        advance(1)


def hessian_of_head(
    stack: DecoderRunner, tokens: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor | None:
    """H = 2 X' diag(w) X [D, D] of what the head reads in the model as it is; None where its module is not called."""
    head, stream = stack.model.get_output_embeddings(), _Stream(stack, tokens)
    for i in range(len(stack)):
        stream.pass_(i)
    few = stack.budget.logit_rows(tokens.shape[1], head.out_features)

    def logits(part: slice) -> None:
        for some in slices(part.stop - part.start, few):
            rows = slice(part.start + some.start, part.start + some.stop)
            stack.exit(stream.hidden[rows], stream.tokens[rows])

    name = next(name for name, module in stack.model.named_modules() if module is head)
    return stream.hessians([name], {} if weights is None else {name: weights}, logits, run=False).get(name)


class _Stream:
    """All calibration rows [N, T] between two layers, worked on in parts of a few rows, fewer where memory runs out."""

    def __init__(self, stack: DecoderRunner, tokens: torch.Tensor) -> None:
        self.stack, self.tokens = stack, stack.place(tokens)
        self.parts = list(slices(len(tokens), stack.budget.recorded_rows(tokens.shape[1])))
        self.calls: dict[tuple[int, int], Any] = {}
        embedded: list[torch.Tensor] = []

        def enter(part: slice) -> None:
            hidden, self.calls[part.start, part.stop] = stack.enter(self.tokens[part])
            embedded.append(hidden)

        self._each(enter)
        self.hidden = torch.cat(embedded)
        """What enters the layer at hand [N, T, D]."""

    def _each(self, work: Callable[[slice], None]) -> None:
        queue, done = self.stack.parts("quantize", self.parts), []
        for part in queue:
            with queue.trying(part):
                work(part)
                done.append(part)
        self.parts = done

    def layer(self, i: int, part: slice) -> torch.Tensor:
        if (key := (part.start, part.stop)) not in self.calls:  # a half of a part that ran out of memory
            self.calls[key] = self.stack.arguments(self.tokens[part])
        return self.stack.plain_layer(i, self.hidden[part], self.calls[key])

    def pass_(self, i: int) -> None:
        def work(part: slice) -> None:
            self.hidden[part] = self.layer(i, part)

        self._each(work)

    def hessians(
        self, names: Sequence[str], weights: Weights, work: Callable[[slice], Any], *, run: bool = True
    ) -> dict[str, torch.Tensor]:
        """H = 2 X' diag(w) X of what each module reads in `work` on each part. run: whether it is to compute, too."""
        modules = [self.stack.model.get_submodule(name) for name in names]
        sums: dict[str, torch.Tensor] = {}

        def add_(part: slice) -> None:
            seen: dict[str, list[torch.Tensor]] = {}

            def record(which: int, forward: Callable[..., Any], x: torch.Tensor) -> Any:
                seen.setdefault(names[which], []).append(x)
                return forward(x) if run else x.new_zeros(*x.shape[:-1], modules[which].weight.shape[0])

            with intercepted(modules, record):
                work(part)
            # nothing is added before all is there: a part that runs out of memory comes again
            counts = {name: weights[name][part] if name in weights else None for name in seen}
            found = {
                name: gram(_weighted(x[0] if len(x) == 1 else torch.cat(x), counts[name])) for name, x in seen.items()
            }
            for name, product in found.items():
                if name not in sums:
                    double = place_of_float64(product.device) == product.device
                    sums[name] = torch.zeros_like(product, dtype=torch.float64 if double else torch.float32)
                sums[name].add_(product)

        self._each(add_)
        return sums


def _weighted(x: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Inputs [B, T, I], or of as many tokens [B * T, I], times the roots of their weights [B, T].

    Of more or fewer tokens, as where a rounded layer before sends others to an expert, each counts 1, as the mean does.
    """
    flat = x.flatten(0, -2)
    if weights is None or weights.numel() != len(flat):
        return x
    return flat.float() * weights.to(x.device).flatten().sqrt().unsqueeze(-1)


# --- costs of widths and weights of tokens ---


def measure(
    model: Any, tokens: torch.Tensor, widths: Mapping[str, Sequence[Width]], *, dtype: torch.dtype, seed: int = 0
) -> dict[str, dict[Width, float]]:
    draw = torch.Generator().manual_seed(seed)
    tokens = tokens[: max(1, TOKENS // tokens.shape[1])]
    sums = {name: dict.fromkeys(each, 0.0) for name, each in widths.items()}

    def costs(name: str, x: torch.Tensor, slope: torch.Tensor) -> list[float]:
        return rise(model.get_submodule(name), x, slope, widths[name], dtype=dtype, draw=draw)

    for _, called in _slopes(model, tokens, list(widths), costs, draw, title="what each width costs"):
        for name, found in called:
            for width, value in zip(widths[name], found, strict=True):
                sums[name][width] += value
    return {name: {width: value / tokens.numel() for width, value in each.items()} for name, each in sums.items()}


def token_weights(model: Any, tokens: torch.Tensor, names: Sequence[str], *, seed: int = 0) -> dict[str, torch.Tensor]:
    """How much what the model predicts depends on a module's outputs at each token.

    The root of the mean over outputs of d^2, d as above, so that H = 2 X' diag(w) X counts an error most where it does
    most harm. To weigh by the gradient is GuidedQuant's idea (2505.07004). Here the root of d^2 is taken, as a few
    tokens count hundreds of times the others without it, all outputs count together, and v is drawn from p.
    """
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}

    def each_token(_: str, x: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        return slope.float().square().mean(-1).sqrt().flatten()

    draw = torch.Generator().manual_seed(seed)
    for batch, called in _slopes(model, tokens, names, each_token, draw, title="what each token counts", inputs=False):
        calls = Counter(name for name, _ in called)
        for name, weights in called:
            if calls[name] == 1 and weights.numel() == batch.numel():
                found[name].append(weights.view(batch.shape))
    whole = {name: torch.cat(parts) for name, parts in found.items() if sum(map(len, parts)) == len(tokens)}
    return {name: weights / weights.mean() for name, weights in whole.items() if weights.mean() > 0}


def _slopes(
    model: Any, tokens: torch.Tensor, names: Sequence[str],
    watch: Callable[[str, torch.Tensor, torch.Tensor], Result], draw: torch.Generator, *, title: str,
    inputs: bool = True,
) -> Iterator[tuple[torch.Tensor, list[tuple[str, Result]]]]:  # fmt: skip
    """Forwards and backwards, batch by batch of tokens [N, T]: a batch [B, T], and what its calls of modules gave.

    watch: told the name, what went in [..., I] (nothing where no `inputs` are kept), and d [..., O] at what came out.
    """
    stack, window = DecoderRunner(model), tokens.shape[1]
    modules, weights = [model.get_submodule(name) for name in names], list(model.parameters())
    vocabulary, itemsize = model.config.get_text_config().vocab_size, model.dtype.itemsize
    kept = sum(kept_bytes([p.shape for p in layer.parameters()], itemsize) for layer in stack.layers)
    rows = min(stack.budget.pass_rows(window, kept), stack.budget.logit_rows(window, vocabulary))
    called, inference = list[tuple[str, Any]](), torch.is_inference_mode_enabled()

    def forward(which: int, run: Callable[..., Any], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        output = run(x, *args, **kwargs)
        if not output.requires_grad:
            output = output.detach().requires_grad_(True)
        read, name = x.detach() if inputs else x.new_empty(0), names[which]
        output.register_hook(lambda slope: called.append((name, watch(name, read, slope))))
        return output.clone()  # which a model may write into, as one that clips its queries does

    batches = stack.parts("quantize", stack.place(tokens).split(rows))
    with bar(title, len(tokens)) as advance:
        for batch in batches:
            found: list[tuple[str, Any]] | None = None
            with batches.trying(batch), torch.inference_mode(False) if inference else nullcontext():
                called.clear()
                with taking_gradients(weights, False), torch.enable_grad(), intercepted(modules, forward):
                    _drawn_log_likelihood_(model(batch.clone(), use_cache=False).logits, draw)
                found = list(called)
            if found is not None:  # else memory ran out, and halves of the batch are next
                yield batch, found
                advance(len(batch))


def _drawn_log_likelihood_(logits: torch.Tensor, draw: torch.Generator) -> None:
    """Backward pass of sum ln p(v), v drawn from p = softmax(logits) at each position of [B, T, V]."""
    p = logits.detach().float().softmax(-1)
    drawn = torch.multinomial(p.flatten(0, 1).cpu(), 1, generator=draw).view(p.shape[:2]).to(p.device)
    logits.backward(likelihood_slope_(p, drawn).to(logits.dtype))


@torch.no_grad()
def rise(
    module: Any, x: torch.Tensor, slope: torch.Tensor, widths: Sequence[Width], *, dtype: torch.dtype,
    draw: torch.Generator,
) -> list[float]:  # fmt: skip
    d: torch.Tensor = slope.flatten(0, -2).float()  # [N, O]
    if isinstance(module, nn.Embedding):
        ids, place = x.flatten().unique(return_inverse=True)
        weight = module.weight[ids]
        errors = (_error(weight, width, dtype) for width in widths)
        return [((error[place] * d).sum(-1).square().sum() / 2).item() for error in errors]
    squares = d.square().sum(0)  # [O]
    total = squares.sum().item()
    if not total > 0:
        return [0.0] * len(widths)
    chosen = torch.multinomial(squares.cpu(), ROWS, replacement=True, generator=draw).to(x.device)
    weight, inputs = module.weight[chosen], x.flatten(0, -2)
    outputs = (F.linear(inputs, _error(weight, width, dtype).to(x.dtype)).float() for width in widths)  # [N, ROWS]
    return [total * each.square().mean().item() / 2 for each in outputs]


def _error(weight: torch.Tensor, width: Width, dtype: torch.dtype) -> torch.Tensor:
    bits, group_size, zero_points = width
    grid = fit_grid(weight, bits, group_size, asymmetric=zero_points, dtype=dtype)
    return weight.float() - decode(encode(weight, grid), grid).float()
