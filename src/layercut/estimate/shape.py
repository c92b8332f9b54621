"""What a model is made of and what one layer of it costs, from the config alone.

The model's own class is built twice without memory: on the meta device, where its parameters and its cache are
counted, and out of fake tensors, which run the CPU's own kernels on shapes alone, so that one row of tokens passing
through each layer tells what is multiplied, what is alive at once and what a backward pass would keep. Nothing here
knows an architecture.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from layercut.evaluation.speed import cache_bytes
from layercut.healing.linear_outputs import WIDEST, is_linear, output_dim
from layercut.models.loading import build, find_decoder, quiet_transformers, skeleton


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Parameters by where they sit, tied ones counted once, and the cache."""

    embedding: int
    layers: list[int]
    """Of every decoder layer."""
    matrices: int
    """Those in matrices of decoder layers, which weight-only quantization makes smaller."""
    head: int
    """0 where the head is the embedding."""
    other: int
    """Final norm, position tables, and towers other than the decoder."""
    tied: bool
    kv_bytes_per_token: int | None
    """Bytes the cache grows by with each token; None where the class cannot be run without weights."""
    caches: dict[str, int]
    """Layers by the kind of their cache: full, sliding WINDOW, linear."""

    @property
    def total(self) -> int:
        return self.embedding + sum(self.layers) + self.head + self.other


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """One row of T tokens through one decoder layer."""

    flops: int
    """Floating-point operations forwards: 2 a multiplication and addition. Attention is counted in full, masked or
    not, as `torch.utils.flop_counter` does."""
    flops_backward: int
    """Backwards to the layer's input, its weights frozen."""
    flops_trained: int
    """Backwards to input and weights."""
    live: int
    """Bytes of what is alive at once inside the layer, beside its input and its weights, forwards without gradients."""
    saved: int
    """Bytes that autograd keeps for the backward pass, weights frozen."""
    saved_trained: int
    """The same where the weights take gradients: each matrix keeps its input as well."""
    kernels: int
    """Operations on tensors that one call of the layer issues, however few the tokens."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model's figures, in one number format and for rows of one length."""

    layers: int
    hidden: int
    vocabulary: int
    itemsize: int
    """Bytes of a number."""
    window: int
    """T, tokens in a row."""
    dense: Parts
    costs: list[LayerCost]
    """Of every decoder layer."""
    widest: int
    """Parameters of the largest tensor."""
    read: tuple[int, int]
    """What the output projections of attention and MLP read, numbers a token: what the fold solves them anew from."""

    def total(self, name: str, start: int = 0, stop: int | None = None) -> int:
        """Sum of one figure of LayerCost over layers [start, stop)."""
        return sum(getattr(cost, name) for cost in self.costs[start:stop])

    def most(self, name: str) -> int:
        return max(getattr(cost, name) for cost in self.costs)

    @property
    def head_flops(self) -> int:
        """One row through the head."""
        return 2 * self.window * self.hidden * self.vocabulary


def count_parts(model: Any) -> Parts:
    """Parameters and cache of a model, by part; the model may be on the meta device."""
    decoder = find_decoder(model)
    taken: set[int] = set()

    def count(module: Any) -> int:
        if module is None:
            return 0
        new = [p for p in module.parameters() if id(p) not in taken]
        taken.update(map(id, new))
        return sum(p.numel() for p in new)

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    stack = list(decoder.layers.values()) if isinstance(decoder.layers, torch.nn.ModuleDict) else list(decoder.layers)
    tied = head is not None and any(p is q for p in head.parameters() for q in embedding.parameters())
    in_embedding, in_head, in_layers = count(embedding), count(head), [count(layer) for layer in stack]
    matrices = sum(p.numel() for p in {id(p): p for la in stack for p in la.parameters() if p.ndim > 1}.values())
    return Parts(
        embedding=in_embedding,
        layers=in_layers,
        head=in_head,
        matrices=matrices,
        other=count(model),
        tied=tied,
        kv_bytes_per_token=_kv_bytes(model),
        caches=cache_kinds(decoder.config),
    )


def _kv_bytes(model: Any) -> int | None:
    wide = next(model.parameters()).dtype == torch.float32
    # where shapes alone know the experts' grouped product in bfloat16 only, every number is twice as wide
    for narrow in (False, True) if wide else (False,):
        try:
            with quiet_transformers():
                return 2 * cache_bytes(copy.deepcopy(model).to(torch.bfloat16)) if narrow else cache_bytes(model)
        except Exception:  # a class whose forward looks at values cannot run without them
            continue
    return None


def cache_kinds(config: Any) -> dict[str, int]:
    """How many layers keep a full cache, one of the last W tokens, or a state that does not grow."""
    from transformers import DynamicCache

    kinds: dict[str, int] = {}
    for layer in DynamicCache(config=config).layers:
        name, window = type(layer).__name__, getattr(layer, "sliding_window", None)
        kind = "linear" if "Linear" in name else f"sliding {window}" if window else "full"
        kinds[kind] = kinds.get(kind, 0) + 1
    return kinds or {"full": config.num_hidden_layers}


def measure_shape(config: Any, dtype: torch.dtype, window: int) -> Shape:
    """Every figure of a model; seconds for a hundred layers, and hardly any memory."""
    model = skeleton(config, dtype)
    decoder = find_decoder(model)
    text = model.config.get_text_config(decoder=True)
    sizes = [p.numel() for p in model.parameters()]
    return Shape(
        layers=len(decoder),
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        itemsize=dtype.itemsize,
        window=window,
        dense=count_parts(model),
        costs=layer_costs(config, dtype, window),
        widest=max(sizes),
        read=read_widths(decoder.layers, text.hidden_size),
    )


def read_widths(layers: torch.nn.Module, hidden: int) -> tuple[int, int]:
    """The least and the most that a layer's output projections read, of the layer where that is most: attention's and
    MLP's, each the last linear module of its part that puts out the hidden width. Experts are no linear modules; of
    what they put out, and of what is too wide, D numbers are read."""

    def of(layer: torch.nn.Module) -> tuple[int, int]:
        read: dict[str, int] = {}
        modules: list[tuple[str, Any]] = [(n, m) for n, m in layer.named_modules() if is_linear(m)]
        for name, module in modules:
            if module.weight.shape[output_dim(module)] == hidden:
                width = module.weight.numel() // hidden
                read[name.rpartition(".")[0]] = width if width <= WIDEST else hidden
        widths = sorted([*read.values(), *[hidden] * (2 - len(read))])
        return widths[0], widths[-1]

    return max(map(of, layers.children()), key=sum)


# --- one layer, on shapes alone -----------------------------------------------------------------------------


def layer_costs(config: Any, dtype: torch.dtype, window: int) -> list[LayerCost]:
    """What each decoder layer costs for one row; layers that look alike are run once."""
    try:
        return _run_layers(config, dtype, window)
    except RuntimeError:
        if dtype.itemsize != 4:
            raise
    # shapes alone know the experts' grouped product in bfloat16 only: take that, every number twice as wide
    wide = ("live", "saved", "saved_trained")
    return [
        replace(cost, **{name: 2 * getattr(cost, name) for name in wide})
        for cost in _run_layers(config, torch.bfloat16, window)
    ]


def _run_layers(config: Any, dtype: torch.dtype, window: int) -> list[LayerCost]:
    with _silent(), FakeTensorMode(), torch.device("cpu"):
        model = build(config, dtype)
        stack = find_decoder(model).layers
        layers = list(stack.values()) if isinstance(stack, torch.nn.ModuleDict) else list(stack)
        calls = _recorded(model, layers, window)
        known: dict[Any, LayerCost] = {}
        costs = []
        for layer, (args, kwargs) in zip(layers, calls, strict=True):
            alike = (type(layer), _signature(layer), _shapes((args, kwargs)))
            if alike not in known:
                known[alike] = _cost(layer, args, kwargs)
            costs.append(known[alike])
    return costs


def _recorded(model: Any, layers: list[Any], window: int) -> list[tuple[Any, dict[str, Any]]]:
    """What the model's own forward hands to each layer, without the cache."""
    calls: dict[int, tuple[Any, dict[str, Any]]] = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, i=i: calls.setdefault(i, (args, kwargs)) and None, with_kwargs=True
        )
        for i, layer in enumerate(layers)
    ]
    # with a cache, or transformers would look at position ids for packed rows, and there are no values to look at
    with torch.no_grad(), quiet_transformers():
        model(input_ids=torch.zeros(1, window, dtype=torch.long), use_cache=True)
    for hook in hooks:
        hook.remove()
    return [(_uncached(calls[i][0]), _uncached(calls[i][1])) for i in range(len(layers))]


def _uncached(value: Any) -> Any:
    from transformers.cache_utils import Cache

    if isinstance(value, dict):
        return {key: False if key == "use_cache" else _uncached(v) for key, v in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_uncached, value))
    return None if isinstance(value, Cache) else value


def _signature(layer: Any) -> Any:
    """Parameter shapes, and the plain attributes that tell one kind of layer from another."""
    shapes = tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())
    kinds = [
        (name, key, value)
        for name, module in layer.named_modules()
        for key, value in vars(module).items()
        if key in ("layer_type", "attention_type", "sliding_window", "is_sliding") and isinstance(value, str | int)
    ]
    return shapes, tuple(kinds)


def _shapes(values: Any) -> Any:
    return tuple(tuple(v.shape) if isinstance(v, torch.Tensor) else type(v) for v in tree_leaves(values))


def _cost(layer: Any, args: Any, kwargs: dict[str, Any]) -> LayerCost:
    def run() -> torch.Tensor:
        hidden = (args[0] if args else kwargs["hidden_states"]).detach().clone()
        hidden.requires_grad_(torch.is_grad_enabled())
        given = (hidden, *args[1:]) if args else args
        named = kwargs if args else kwargs | {"hidden_states": hidden}
        output = layer(*given, **named)
        return output[0] if isinstance(output, tuple) else output

    with torch.no_grad(), LiveBytes(layer) as live, FlopCounterMode(display=False, custom_mapping=FLOPS) as forward:
        run()
    saved, backward = _backward(run, layer)
    layer.requires_grad_(True)
    saved_trained, trained = _backward(run, layer)
    layer.requires_grad_(False)
    return LayerCost(
        flops=forward.get_total_flops(),
        flops_backward=backward,
        # a weight's gradient costs what its product did; the counter overrates that of grouped convolutions
        flops_trained=min(trained, backward + forward.get_total_flops()),
        live=live.peak,
        saved=saved,
        saved_trained=saved_trained,
        kernels=live.kernels,
    )


def _backward(run: Any, layer: Any) -> tuple[int, int]:
    """(bytes kept for the backward pass beside the weights, operations of that pass)."""
    weights = {p.untyped_storage()._cdata for p in layer.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    with torch.enable_grad():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = run()
        with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
            output.backward(torch.ones_like(output))
    for p in layer.parameters():
        p.grad = None
    return sum(storage.nbytes() for storage in kept.values()), counter.get_total_flops()


class LiveBytes(TorchDispatchMode):
    """The most bytes alive at once of what is made while it is open; views of the layer's weights are not made."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.now = self.peak = self.kernels = 0
        self.weights = {t.untyped_storage()._cdata for t in (*layer.parameters(), *layer.buffers())}
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.kernels += 1
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if (key := storage._cdata) not in self.sizes and key not in self.weights:
                    self.sizes[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._freed, key)
        return output

    def _freed(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


def _attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Two products, scores and values.  [B, H, S, d] x [B, H, T, d], [B, H, T, e]"""
    b, h, s, d = query
    return 2 * b * h * s * key[-2] * (d + value[-1])


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Five products: the scores once more, and the gradients of values, probabilities, queries and keys."""
    b, h, s, d = query
    return 2 * b * h * s * key[-2] * (3 * d + 2 * value[-1])


def _grouped(a: Any, b: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Every row of a through the matrix of its own expert.  [M, K] x [E, K, N]; a gradient: [K, M] x [M, N]"""
    return 2 * a[0] * a[1] * b[-1]


_aten = torch.ops.aten
FLOPS = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _aten._grouped_mm: _grouped,
}
"""What this version of torch's counter does not know of itself."""


@contextmanager
def _silent() -> Iterator[None]:
    """Fake tensors log as errors what is raised anyhow."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
