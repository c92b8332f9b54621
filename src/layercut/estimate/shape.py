"""What a model is made of and what one layer of it costs (`models/cost.py`), measured from the config alone.

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
from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from layercut.evaluation.speed import cache_bytes
from layercut.healing.linear_outputs import read_widths
from layercut.models.cost import LayerCost, Parts, Shape
from layercut.models.decoder_stack import find_decoder
from layercut.models.loading import build, quiet_transformers, skeleton
from layercut.models.memory import kept_bytes
from layercut.models.runner import hidden_of, intercepted, replaced_hidden


def count_parts(model: Any) -> Parts:
    """Parameters and cache of a model, by part; the model may be on the meta device."""
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
        embedding=count(embedding),
        head=count(head),
        layers=[count(layer) for layer in decoder.layers.children()],
        matrices=sum(matrices.values()),
        other=count(model),
        tied=tied,
        kv_bytes_per_token=_kv_bytes(model),
        caches=cache_kinds(decoder.config),
    )


def _kv_bytes(model: Any) -> int | None:
    # where shapes alone know the experts' grouped product in bfloat16 only, every number is twice as wide
    for narrow in (False, True) if model.dtype == torch.float32 else (False,):
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
    text = model.config.get_text_config(decoder=True)
    try:
        costs = _layer_costs(config, dtype, window)
    except RuntimeError:
        if dtype.itemsize != 4:
            raise
        # shapes alone know the experts' grouped product in bfloat16 only: take that, every number twice as wide
        costs = [
            replace(
                cost, live=2 * cost.live, saved=2 * cost.saved, saved_trained=2 * cost.saved_trained, kept=2 * cost.kept
            )
            for cost in _layer_costs(config, torch.bfloat16, window)
        ]
    return Shape(
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        itemsize=dtype.itemsize,
        window=window,
        dense=count_parts(model),
        costs=costs,
        read=read_widths(find_decoder(model).layers, text.hidden_size),
    )


def _layer_costs(config: Any, dtype: torch.dtype, window: int) -> list[LayerCost]:
    """What each decoder layer costs for one row; those with parameters of the same names and sizes are run once."""
    known: dict[Any, tuple[LayerCost, Any]] = {}
    costs: list[LayerCost] = []

    def measured(i: int, run: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        alike = tuple((name, p.shape) for name, p in layers[i].named_parameters())
        if alike not in known:
            given = [_uncached(value) for value in args]
            named = {key: False if key == "use_cache" else _uncached(value) for key, value in kwargs.items()}
            known[alike] = _cost(layers[i], lambda h: run(h, *given, **named), hidden)
        costs.append(known[alike][0])
        return known[alike][1]

    with _silent(), FakeTensorMode(), torch.device("cpu"):
        model = build(config, dtype)
        layers = list(find_decoder(model).layers.children())
        # with a cache, or transformers would look at position ids for packed rows, and there are no values to look at
        with torch.no_grad(), quiet_transformers(), intercepted(layers, measured):
            model(input_ids=torch.zeros(1, window, dtype=torch.long), use_cache=True)
    return costs


def _uncached(value: Any) -> Any:
    from transformers.cache_utils import Cache

    return None if isinstance(value, Cache) else value


def _cost(layer: Any, run: Any, hidden: torch.Tensor) -> tuple[LayerCost, Any]:
    """One layer's cost, and what it puts out for hidden states [1, T, D]."""
    with LiveBytes(layer) as live, FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
        output = run(hidden)
    saved = _kept(run, layer, hidden)
    layer.requires_grad_(True)
    cost = LayerCost(
        flops=counter.get_total_flops(), live=live.peak, kernels=live.kernels, saved=saved,
        kept=kept_bytes([p.shape for p in layer.parameters()], hidden.dtype.itemsize),
        saved_trained=_kept(run, layer, hidden),
    )  # fmt: skip
    layer.requires_grad_(False)
    return cost, replaced_hidden(output, hidden_of(output).detach())


def _kept(run: Any, layer: Any, hidden: torch.Tensor) -> int:
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


class LiveBytes(TorchDispatchMode):
    """The most bytes alive at once of what is made while it is open; views of the layer's weights are not made."""

    def __init__(self, layer: Any) -> None:
        """Watch what is made for a layer, whose weights are not counted."""
        super().__init__()
        self.now = self.peak = self.kernels = 0
        self.weights = {t.untyped_storage()._cdata for t in (*layer.parameters(), *layer.buffers())}
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note what it has made."""
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
    """Operations of two products, scores and values: [B, H, S, d] x [B, H, T, d], [B, H, T, e]."""
    b, h, s, d = query
    return 2 * b * h * s * key[-2] * (d + value[-1])


def _grouped(a: Any, b: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Operations of every row through the matrix of its own expert: [M, K] x [E, K, N]."""
    return 2 * a[0] * a[1] * b[-1]


_aten = torch.ops.aten
FLOPS = {_aten._scaled_dot_product_flash_attention_for_cpu: _attention, _aten._grouped_mm: _grouped}
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
