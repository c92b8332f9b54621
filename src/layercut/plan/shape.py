"""What a model is made of and what one row of tokens through a layer of it costs, from its config alone.

Its own class is built on the meta device, where parameters and cache are counted, and out of fake tensors, which run
the CPU's kernels on shapes alone. Nothing here knows an architecture.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from layercut.evaluation.speed import cache_bytes
from layercut.healing.linear_outputs import read_widths
from layercut.models.decoder_stack import find_decoder
from layercut.models.loading import build, quiet_transformers, skeleton
from layercut.models.runner import hidden_of, intercepted, replaced_hidden


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Parameters by where they sit, tied ones counted once, and the cache."""

    embedding: int
    layers: list[int]
    matrices: int  # those in matrices of decoder layers, which quantization makes smaller
    head: int  # 0 where the head is the embedding
    other: int  # final norm, position tables, and towers other than the decoder
    tied: bool
    kv_bytes_per_token: int | None  # None where the class cannot be run without weights
    caches: dict[str, int]  # layers by the kind of their cache: full, sliding WINDOW, linear

    @property
    def total(self) -> int:
        """All parameters."""
        return self.embedding + sum(self.layers) + self.head + self.other


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """One row of T tokens through one decoder layer."""

    flops: int
    """Forwards, 2 for a multiplication and addition, attention in full. A backward pass to the input is as many."""
    live: int  # bytes alive at once inside the layer, beside its input and its weights, without gradients
    saved: int  # bytes that autograd keeps for the backward pass, weights frozen
    saved_trained: int  # the same where the weights take gradients
    kernels: int  # operations that one call of the layer issues


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model in one number format, for rows of one length."""

    hidden: int
    vocabulary: int
    itemsize: int
    window: int
    dense: Parts
    costs: list[LayerCost]
    read: tuple[int, int]  # widths that the output projections of attention and MLP read, which the fold solves for

    @property
    def layers(self) -> int:
        """L."""
        return len(self.costs)

    @property
    def outside(self) -> int:
        """Parameters that are in no decoder layer."""
        return self.dense.total - sum(self.dense.layers)

    def rows_of(self, tokens: int) -> int:
        """N, rows of T tokens that hold so many."""
        return -(-tokens // self.window)

    def mean(self, name: str) -> float:
        """Of one figure of LayerCost, over all layers."""
        return sum(getattr(cost, name) for cost in self.costs) / self.layers

    def most(self, name: str) -> int:
        """The largest of one figure of LayerCost."""
        return max(getattr(cost, name) for cost in self.costs)

    def stream(self, rows: int) -> int:
        """Bytes of the hidden state of so many rows."""
        return rows * self.window * self.hidden * self.itemsize


def count_parts(model: Any) -> Parts:
    """Parameters and cache of a model, which may be on the meta device."""
    decoder = find_decoder(model)
    taken: set[int] = set()

    def count(module: Any) -> int:
        new = [p for p in module.parameters() if id(p) not in taken] if module is not None else []
        taken.update(map(id, new))
        return sum(p.numel() for p in new)

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and any(p is q for p in head.parameters() for q in embedding.parameters())
    matrices = {id(p): p.numel() for layer in decoder.layers.children() for p in layer.parameters() if p.ndim > 1}
    return Parts(
        embedding=count(embedding), head=count(head), layers=[count(layer) for layer in decoder.layers.children()],
        matrices=sum(matrices.values()), other=count(model), tied=tied, kv_bytes_per_token=_kv_bytes(model),
        caches=_cache_kinds(decoder.config),
    )  # fmt: skip


def _kv_bytes(model: Any) -> int | None:
    # fake tensors know the experts' grouped product in bfloat16 only, where every number is half as wide
    for narrow in (False, True) if model.dtype == torch.float32 else (False,):
        try:
            with quiet_transformers():
                return 2 * cache_bytes(copy.deepcopy(model).to(torch.bfloat16)) if narrow else cache_bytes(model)
        except Exception:  # a class whose forward looks at values cannot run without them
            continue
    return None


def _cache_kinds(config: Any) -> dict[str, int]:
    from transformers import DynamicCache

    kinds: dict[str, int] = {}
    for layer in DynamicCache(config=config).layers:
        name, window = type(layer).__name__, getattr(layer, "sliding_window", None)
        kind = "linear" if "Linear" in name else f"sliding {window}" if window else "full"
        kinds[kind] = kinds.get(kind, 0) + 1
    return kinds or {"full": config.num_hidden_layers}


def measure_shape(config: Any, dtype: torch.dtype, window: int, dense: Parts | None = None) -> Shape:
    """Every figure of a model; seconds for a hundred layers, and hardly any memory. dense: its parts, where known."""
    model = skeleton(config, dtype)
    text = model.config.get_text_config(decoder=True)
    try:
        costs = _layer_costs(config, dtype, window)
    except RuntimeError:
        if dtype.itemsize != 4:
            raise
        wide = ("live", "saved", "saved_trained")  # as in _kv_bytes
        costs = [
            replace(cost, **{name: 2 * getattr(cost, name) for name in wide})
            for cost in _layer_costs(config, torch.bfloat16, window)
        ]
    return Shape(
        hidden=text.hidden_size, vocabulary=text.vocab_size, itemsize=dtype.itemsize, window=window,
        dense=dense or count_parts(model), costs=costs, read=read_widths(find_decoder(model).layers, text.hidden_size),
    )  # fmt: skip


def _layer_costs(config: Any, dtype: torch.dtype, window: int) -> list[LayerCost]:
    """Of each decoder layer; those with parameters of the same names and sizes are run once."""
    known: dict[Any, tuple[LayerCost, Any]] = {}
    costs: list[LayerCost] = []

    def measured(i: int, run: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        layer = layers[i]
        alike = tuple((name, p.shape) for name, p in layer.named_parameters())
        if alike not in known:
            given, named = without_cache(args, kwargs)
            with _LiveBytes(layer) as live, FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
                output = run(hidden, *given, **named)
            saved = []
            for trained in (False, True):
                layer.requires_grad_(trained)
                saved.append(_saved(lambda h: run(h, *given, **named), layer, hidden))
            layer.requires_grad_(False)
            cost = LayerCost(
                flops=counter.get_total_flops(), live=live.peak, kernels=live.kernels,
                saved=saved[0], saved_trained=saved[1],
            )  # fmt: skip
            known[alike] = cost, replaced_hidden(output, hidden_of(output).detach())
        costs.append(known[alike][0])
        return known[alike][1]

    logger = logging.getLogger("torch._subclasses.fake_tensor")  # logs as errors what is raised anyhow
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with FakeTensorMode(), torch.device("cpu"):
            model = build(config, dtype)
            model.requires_grad_(False)
            layers = list(find_decoder(model).layers.children())
            # with a cache, or transformers would look at the values of position ids
            with torch.no_grad(), quiet_transformers(), intercepted(layers, measured):
                model(input_ids=torch.zeros(1, window, dtype=torch.long), use_cache=True)
    finally:
        logger.setLevel(level)
    return costs


def without_cache(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """What a layer is called with, where it is to keep no cache."""
    from transformers.cache_utils import Cache

    given = [None if isinstance(value, Cache) else value for value in args]
    named = {key: None if isinstance(value, Cache) else value for key, value in kwargs.items()}
    return given, named | ({"use_cache": False} if "use_cache" in named else {})


def _saved(run: Any, layer: Any, hidden: torch.Tensor) -> int:
    """Bytes kept for the backward pass beside the weights."""
    weights = {p.untyped_storage()._cdata for p in layer.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _output = run(hidden.detach().clone().requires_grad_(True))
    return sum(storage.nbytes() for storage in kept.values())


class _LiveBytes(TorchDispatchMode):
    """The most bytes alive at once of what is made while it is open; a layer's weights are not counted."""

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
    """Scores and values: [B, H, S, d] x [B, H, T, d], [B, H, T, e]."""
    b, h, s, d = query
    return 2 * b * h * s * key[-2] * (d + value[-1])


def _grouped(a: Any, b: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Every row through the matrix of its own expert: [M, K] x [E, K, N]."""
    return 2 * a[0] * a[1] * b[-1]


_aten = torch.ops.aten
FLOPS = {_aten._scaled_dot_product_flash_attention_for_cpu: _attention, _aten._grouped_mm: _grouped}
"""What this version of torch's counter does not know of itself."""
