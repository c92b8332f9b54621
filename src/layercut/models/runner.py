"""A decoder opened up: embeddings, then layer by layer, then the head; and rows of tokens taken through it.

Search, fold and tuning all need hidden states *between* layers. `DecoderRunner` gives them for any architecture
without knowing it: what a layer receives beside the hidden state (masks, positions, rotary embeddings, by layer
type) is recorded from the model's own forward, in which every layer passes its input on untouched.

    stack = DecoderRunner(model)
    h, calls = stack.enter(tokens)          # embeddings [B, T, D] and what each layer will need
    h = stack.run(h, calls, 0, 13)          # layers 0 … 12
    logits = stack.exit(h, tokens)          # final norm and head [B, T, V]

Layers on disk (`models/layer_reader.py`) are read where another one was entered last, so all batches go through a layer
before the next one (`passes`, `carry_`). A model that is sharded over several processes (`distributed/sharding.py`)
runs as a copy over the same weights, and all processes must take as many steps (`sharding.in_step`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.checkpoint import checkpoint

from layercut.distributed import processes, sharding
from layercut.errors import ModelError
from layercut.files import size
from layercut.models.decoder_stack import find_decoder, positions, stored_dtype
from layercut.models.layer_reader import layers_on_disk
from layercut.models.memory import Budget, ShrinkingParts, available_bytes, budget, memory_limit, placed
from layercut.progress import say

Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]
Part = TypeVar("Part")
REPEATS, NOISE = 3, 4
"""Where layer by layer a model's logits are not its own to the bit: forwards that show how far its own are from each
other, and how many times as far those may be."""
STREAMS_SHARE = 0.5
"""Hidden states may take this share of the available memory; beyond it, rows go in several passes. A guess."""


@contextmanager
def intercepted(layers: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """While open, layer i computes `forward(i, run, hidden, *args, **kwargs)`; `run` is the layer's own forward.

    Only `forward` of each instance is replaced, so that types, attributes and hooks stay what the model's loop
    expects. The layers are as they were on exit, also after an error.
    """
    own = [layer.__dict__.get("forward") for layer in layers]

    def replace(i: int, run: Callable[..., Any]) -> Callable[..., Any]:
        device = own_device(layers[i])

        def replacement(*args: Any, **kwargs: Any) -> Any:
            if device is not None:
                args, kwargs = send_to_device((args, kwargs), device)
            if args:
                return forward(i, run, *args, **kwargs)
            return forward(i, run, kwargs.pop("hidden_states"), **kwargs)

        return replacement

    try:
        for i, layer in enumerate(layers):
            layer.forward = replace(i, layer.forward)
        yield
    finally:
        for layer, before in zip(layers, own, strict=True):
            layer.__dict__.pop("forward", None)
            if before is not None:
                layer.forward = before


def own_device(layer: nn.Module) -> torch.device | None:
    """The device that accelerate's hooks move a layer's inputs to; None where they move none: all are on one device."""
    return next(layer.parameters()).device if hasattr(layer, "_hf_hook") else None


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden state in a layer's output, which is a tensor or a tuple that starts with it."""
    return output[0] if isinstance(output, tuple) else output


def replaced_hidden(output: Any, hidden: torch.Tensor) -> Any:
    """A layer's output with another hidden state in it."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


class DecoderRunner:
    """A model's decoder, run piece by piece: embeddings, any of the layers, final norm and head.

    Args:
        model: a causal LM of transformers, in memory, with layers on disk or sharded over processes.

    Raises:
        ModelError: layers exchange more than the hidden state, so that running them one by one is not what the model
            computes.
    """

    def __init__(self, model: Any) -> None:
        self.at_rest = model
        """The model as it was given."""
        self.model = sharding.runnable(model)
        """The one that runs: the same, unless its weights are sharded over several processes."""
        self.layers = find_decoder(self.model).layers
        self.on_disk = layers_on_disk(model)
        """The reader behind the layers; None where they are in memory."""
        self._shapes: dict[type, Any] = {}  # by class of layer, the structure of what it returns
        self._free = None if self.device.type == "cpu" else available_bytes(self.device)
        # what is checked depends on the classes and the config, not on the weights: layers on disk get random ones
        with self.on_disk.files.random_weights() if self.on_disk else nullcontext():
            self._check()

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def vocabulary(self) -> int:
        return self.model.config.get_text_config().vocab_size

    @property
    def hidden_size(self) -> int:
        return self.model.config.get_text_config().hidden_size

    @property
    def original_layer_index(self) -> list[int] | None:
        """Where each layer stood in the first model of all, as a cut notes it in the config; None without a note."""
        config = self.at_rest.config
        found = getattr(config, "original_layer_index", None)
        return found or getattr(config.get_text_config(), "original_layer_index", None)

    @property
    def device(self) -> torch.device:
        """The device of the weights that are in memory."""
        return next(p.device for p in self.model.parameters() if not p.is_meta)

    @property
    def stored_dtype(self) -> torch.dtype:
        return stored_dtype(self.model)

    @property
    def budget(self) -> Budget:
        """What one pass may take; by what was free when this runner was made, so that it changes only where halved."""
        return budget(self.device, self._free)

    def parts(self, stage: str, parts: Iterable[Part]) -> ShrinkingParts[Part]:
        """Work in parts that become smaller where memory runs out; unless other processes wait for each of them."""
        return ShrinkingParts(stage, parts, self.device, alone=not sharding.is_spread(self.model))

    def loaded(self, i: int) -> nn.Module:
        """Layer i with its weights in memory: read now where it is on disk, and there until another is entered."""
        if self.on_disk:
            self.on_disk.enter_(self.layers[i])
        return self.layers[i]

    def layer_at_rest(self, i: int) -> nn.Module:
        """Layer i of the model as it was given."""
        return find_decoder(self.at_rest).layers[i]

    def stream_bytes(self, tokens: int) -> int:
        """Bytes of one hidden state of so many tokens."""
        return tokens * self.hidden_size * self.model.dtype.itemsize

    def place(self, tokens: torch.Tensor) -> torch.Tensor:
        return placed(tokens, self.device)

    def on_device_of(self, i: int, hidden: torch.Tensor) -> torch.Tensor:
        """h_i [B, T, D] on the device of layer i, where layers are on several: for what is computed beside it."""
        device = own_device(self.layers[i])
        return hidden if device is None else hidden.to(device)

    def enter(self, tokens: torch.Tensor) -> tuple[torch.Tensor, Calls]:
        """Embeddings [B, T, D] of tokens [B, T], and the further arguments of every layer for these tokens."""
        calls: Calls = []
        embedded: list[torch.Tensor] = []

        def record(i: int, run: Callable[..., Any], hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if i == 0:
                embedded.append(hidden)
            calls.append((args, kwargs))
            return self._untouched(i, run, hidden, *args, **kwargs)

        with intercepted(self.layers, record), sharding.not_gathering(self.layers):
            one = self._keep(torch.zeros(1, dtype=torch.long, device=self.device))  # spares the head
            self.model(input_ids=self.place(tokens), use_cache=False, **one)
        return embedded[0], calls

    def arguments(self, tokens: torch.Tensor) -> Calls:
        return self.enter(tokens)[1]

    def layer(self, i: int, hidden: torch.Tensor, calls: Calls) -> torch.Tensor:
        """h_{i+1} = f_i(h_i) [B, T, D]. Under a gradient a layer on disk is recomputed, or the graph would hold it."""
        if self.on_disk and torch.is_grad_enabled() and hidden.requires_grad:
            return recomputed_layer(self, i, hidden, calls)
        return self.plain_layer(i, hidden, calls)

    def plain_layer(self, i: int, hidden: torch.Tensor, calls: Calls) -> torch.Tensor:
        """The same wherever the layer is."""
        args, kwargs = calls[i]
        return hidden_of(self.layers[i](hidden, *args, **kwargs))

    def run(self, hidden: torch.Tensor, calls: Calls, start: int, stop: int) -> torch.Tensor:
        """h_stop from h_start [B, T, D]: layers start, start + 1, …, stop - 1."""
        for i in range(start, stop):
            for j in range(i, min(i + 2, stop)):
                sharding.gather_ahead(self.layers[j])
            hidden = self.layer(i, hidden, calls)
        return hidden

    def last(self, tokens: torch.Tensor) -> torch.Tensor:
        """h_L [B, T, D] of tokens [B, T], what leaves the last layer."""
        hidden, calls = self.enter(tokens)
        return self.run(hidden, calls, 0, len(self))

    def exit(self, hidden: torch.Tensor, tokens: torch.Tensor, part: slice | None = None) -> torch.Tensor:
        """Logits [B, T, V] from h_L [B, T, D], or of some positions: the model's forward, with no layer computing."""
        longest = positions(self.model.config) or tokens.shape[1]
        if part is None and tokens.shape[1] > longest:  # of many rows, put together
            pieces = zip(hidden.split(longest, 1), tokens.split(longest, 1), strict=True)
            return torch.cat([self.exit(*piece) for piece in pieces], 1)
        last = len(self.layers) - 1
        kept = {} if part is None else self._keep(torch.arange(part.start, part.stop, device=self.device))

        def inject(i: int, run: Callable[..., Any], h: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return self._untouched(i, run, hidden if i == last else h, *args, **kwargs)

        with intercepted(self.layers, inject), sharding.not_gathering(self.layers):
            logits = self.model(input_ids=self.place(tokens), use_cache=False, **kept).logits
        return logits if part is None or kept else logits[:, part]

    def head_once(self) -> AbstractContextManager[None]:
        """While open, a head that computes its weight (a quantized one in training, `weight_once`) does so once."""
        return getattr(self.model.get_output_embeddings(), "weight_once", nullcontext)()

    def _untouched(self, i: int, run: Callable[..., Any], hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """What layer i would return had it changed nothing."""
        kind = type(self.layers[i])
        if kind not in self._shapes:
            with torch.no_grad(), sharding.gathered(self.layers[i]):
                output = run(hidden, *args, **kwargs)
            self._shapes[kind] = tuple(None for _ in output) if isinstance(output, tuple) else None
        return replaced_hidden(self._shapes[kind], hidden)

    def _keep(self, positions: torch.Tensor) -> dict[str, torch.Tensor]:
        """Have the head run on these positions only, where the model lets it.

        As an index, not as a number: that would take a slice, and a product with rows that are not contiguous copies
        the head's weight once for every row (8 rows and a vocabulary of 152k took 2.2 GB; in bfloat16 16 rows took 15
        seconds of a processor where they take 0.03).
        """
        head = self.model.get_output_embeddings()
        # a model's hook brings all that it is given to one device, and what is taken from is where the head is
        elsewhere = head is not None and own_device(head) not in (None, positions.device)
        known = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        return {"logits_to_keep": positions} if known and not elsewhere else {}

    @torch.no_grad()
    def _check(self) -> None:
        tokens = torch.arange(8, device=self.device)[None] % self.vocabulary
        expected = getattr(self.model(input_ids=tokens, use_cache=False), "logits", None)
        if expected is None:
            words = f"a {type(self.model).__name__} has no language-model head, and gives no logits"
            raise ModelError(words, "AutoModelForCausalLM.from_pretrained(name)")
        hidden, calls = self.enter(tokens)
        got = self.exit(self.run(hidden, calls, 0, len(self)), tokens)
        if hidden.shape[:2] != tokens.shape or not self._agrees(expected, got, tokens):
            raise ModelError(
                f"the layers of {type(self.model).__name__} exchange more than the hidden state, "
                "so they cannot be searched or healed one by one",
                "cut a segment you choose yourself: layercut cut MODEL --segment START:STOP",
            )

    def _agrees(self, expected: torch.Tensor, got: torch.Tensor, tokens: torch.Tensor) -> bool:
        """Whether logits are those of the model's own forward [1, T, V]: to the bit, or as near as that is to itself.

        Kernels that add in any order (fused attention, experts) give other last bits at every run.
        """
        # a model that overflows has the same NaN both ways; whether it may is for those who use its predictions
        if got.shape != expected.shape or not torch.equal(got.isnan(), expected.isnan()):
            return False
        away = (got.float() - expected.float()).nan_to_num().abs().max().item()
        if away == 0:
            return True
        runs = [self.model(input_ids=tokens, use_cache=False).logits for _ in range(REPEATS)]
        noise = max((run.float() - expected.float()).nan_to_num().abs().max().item() for run in runs)
        # more than rounding: it remembers what it ran before
        rounding = min(2**10 * torch.finfo(expected.dtype).eps, 0.05) * expected.float().nan_to_num().abs().max().item()
        if away > NOISE * noise or noise > rounding:
            return False
        say(
            "model",
            f"{type(self.model).__name__} does not give the same logits twice (they differ by up to {noise:.2g}); "
            f"run layer by layer they differ by {away:.2g}, allowed are {NOISE} times its own",
        )
        return True


def recomputed_layer(stack: DecoderRunner, i: int, hidden: torch.Tensor, calls: Calls) -> torch.Tensor:
    """h_{i+1} = f_i(h_i), of which only h_i is kept for the backward pass: there the layer is run again.

    So a gradient passes through a model of which one layer is in memory at a time; on disk, layer i is read again
    in the backward pass, the layers below it read ahead downwards. The same gradients as `stack.layer` gives.
    """
    # no randomness: models are in eval mode
    return checkpoint(stack.plain_layer, i, hidden, calls, use_reentrant=False, preserve_rng_state=False)


# --- rows of tokens through a model ---------------------------------------------------------------------------------


def passes(stack: DecoderRunner, tokens: torch.Tensor, rows: int, streams: int) -> list[list[torch.Tensor]]:
    """Tokens as batches, grouped by pass through the stack.

    In memory a batch is a pass, since another pass costs nothing. On disk all batches go in one pass, so that each
    layer is read once; where the hidden states of all rows would not fit, in as few as possible.
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


def rows_at_once(stack: DecoderRunner, window: int, streams: int) -> int:
    """Rows of tokens whose hidden states fit in memory."""
    return max(1, int(STREAMS_SHARE * available_bytes(stack.device)) // (streams * stack.stream_bytes(window)))


def say_passes(stack: DecoderRunner, tokens: int, streams: int, times: int) -> None:
    """Say what the hidden states of one pass take, and how often layers on disk are read."""
    if stack.on_disk:
        taken = size(streams * stack.stream_bytes(tokens))
        often = f"layers are read {times} time{'s'[: times > 1]}"
        stack.on_disk.say_once(f"{streams} hidden states of {tokens:,} tokens, {taken}; {often}")


def enter_all(stack: DecoderRunner, batches: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[Calls]]:
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

    def below(stack: DecoderRunner) -> list[int]:
        """All that is not in a layer; a head of its own counts too, to be safe."""
        inside = {id(tensor) for layer in stack.layers for tensor in layer.parameters()}
        return [id(tensor) for tensor in stack.model.parameters() if id(tensor) not in inside]

    if below(dense) != below(student):
        return 0
    both = [[[id(t) for t in (*m.parameters(), *m.buffers())] for m in stack.layers] for stack in (dense, student)]
    same = [one == other for one, other in zip(*both, strict=False)]
    return same.index(False) if False in same else len(same)


def common_prefix(
    dense: DecoderRunner, student: DecoderRunner, tokens: torch.Tensor, prefix: int
) -> tuple[torch.Tensor, Calls, Calls]:
    """h_prefix of two models whose layers below `prefix` are the same, computed once."""
    hidden, calls = dense.enter(tokens)
    return dense.run(hidden, calls, 0, prefix), calls, student.arguments(tokens)


# --- models of a caller ------------------------------------------------------------------------------------------


def model_of(given: Any) -> Any:
    """The model that a caller gives, itself or in a `DecoderRunner`."""
    if isinstance(given, DecoderRunner):
        return given.at_rest
    kind = type(given).__name__
    if hasattr(given, "merge_and_unload"):
        words = f"a {kind} is given as a model: what peft's adapters stand around"
        raise ModelError(words, "model.merge_and_unload() gives the model with the adapters in its weights")
    if not isinstance(given, nn.Module) or not hasattr(getattr(given, "config", None), "get_text_config"):
        words = f"a {kind} is given as a model, and is no language model of transformers in memory"
        raise ModelError(words, "AutoModelForCausalLM.from_pretrained(name)")
    return given


@contextmanager
def prepared(*models: Any) -> Iterator[list[DecoderRunner]]:
    """Runners of models, which while open are in eval mode and need no gradients.

    On exit, also after an error, every module has its training mode and every parameter, by name, its
    `requires_grad` again: also one that was put in meanwhile in the place of another.
    """
    at_rest = [model_of(model) for model in models]
    flags = [{name: p.requires_grad for name, p in model.named_parameters()} for model in at_rest]

    def set_flags_(model: nn.Module, flags: dict[str, bool]) -> None:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad != flags.get(name, False):
                parameter.requires_grad_(flags.get(name, False))

    # in inference mode nothing can be trained
    within = torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
    with memory_limit(), in_eval_mode(*at_rest), within:
        try:
            for model in at_rest:
                set_flags_(model, {})
            yield [model if isinstance(model, DecoderRunner) else DecoderRunner(model) for model in models]
        finally:
            for model, before in zip(at_rest, flags, strict=True):
                set_flags_(model, before)


@contextmanager
def in_eval_mode(*models: nn.Module) -> Iterator[None]:
    """Models in eval mode while open; each module's own mode is put back afterwards, also after an error."""
    training = [module for model in models for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
