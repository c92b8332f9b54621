"""One cut, judged: is the model that is left right, honestly refused, or wrong?

`judge(original, segments, folder)` cuts a tiny random model and holds it against what the cut is meant to be: the
original with the removed layers made the identity. Used by the tests and by research/family_census.py.
"""

from __future__ import annotations

import copy
import inspect
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

import families
from layercut.errors import LayercutError, ModelError, SurgeryError
from layercut.models.decoder_stack import find_decoder
from layercut.segments import Segment
from layercut.surgery import cut_checkpoint, cut_segment_

NEW_TOKENS = 5
"""After a prompt of five: together beyond the sliding windows of `families`."""
CUTS: dict[str, list[tuple[int, int]]] = {
    "middle": [(2, 4)], "odd": [(3, 4)], "long": [(1, 6)], "first": [(0, 1)], "last": [(7, 8)],
    "two": [(1, 2), (4, 6)], "period": [(2, 6)],
}  # fmt: skip
"""The cuts of the census, of a stack of `families.LAYERS`."""


def tolerance(config: Any) -> float:
    """0 (equal to the bit), but for constants folded into weights and for RWKV's halvings, which it places by index."""
    if config.model_type == "diffllama" or getattr(config, "scale_attn_by_inverse_layer_idx", False):
        return 1e-4
    return 1e-3 if config.model_type == "rwkv" else 0.0


@dataclass
class Verdict:
    """right; refused (why); wrong (how); or unjudged: transformers fails on the uncut model too (how)."""

    kind: str
    why: str = ""


def segments_of(cut: str | Sequence[tuple[int, int]]) -> list[Segment]:
    return [Segment(*bounds) for bounds in (CUTS[cut] if isinstance(cut, str) else cut)]


@dataclass
class Original:
    """A tiny model, saved in a folder, and what it can do uncut (some classes fail even that)."""

    model: Any
    folder: Path
    trouble: str
    """What goes wrong when the uncut model is saved and loaded."""
    generates: bool


def original(model_type: str, folder: Path, **facts: Any) -> Original:
    families.check_size(model_type, **facts)
    model = families.tiny(model_type, **facts)
    model.save_pretrained(folder)
    generates = generation_trouble(model) == ""
    trouble = _reload_trouble(model, folder, generates)
    if trouble.startswith("logits"):  # some classes mend weights on loading: then what was loaded is the original
        model = type(model).from_pretrained(folder, dtype=torch.float32).eval()
        shutil.rmtree(folder)
        model.save_pretrained(folder)
        _align_(model)
        trouble = _reload_trouble(model, folder, generates)
    return Original(model, folder, trouble, generates)


def judge(source: Original, segments: Sequence[Segment], scratch: Path) -> Verdict:
    """Cut in memory and on disk and compare; wrong wins over refused, refused over right."""
    try:
        wanted = reference_logits(source.model, segments)
    except ModelError as error:
        return Verdict("refused", f"{error.message} / {error.hint}")
    cut, before = copy.deepcopy(source.model), fingerprint(source.model)
    out, saved = scratch / "cut", scratch / "saved"
    for folder in (out, saved):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        cut_segment_(cut, segments)
    except LayercutError as error:
        return _judge_refusal(source, cut, segments, out, error)
    cut.save_pretrained(saved)  # before it runs: RWKV changes its weights when it does
    if fingerprint(source.model) != before:
        return Verdict("wrong", "the original model was changed")
    trouble = _logits_trouble(cut, wanted, tolerance(cut.config)) or (source.generates and generation_trouble(cut))
    if trouble:
        return Verdict("wrong", f"in memory: {trouble}")
    if source.trouble:
        return Verdict("unjudged", f"transformers, saving and loading the uncut model: {source.trouble}")
    if trouble := _reload_trouble(cut, saved, source.generates):
        return Verdict("wrong", f"saved and reloaded: {trouble}")
    try:
        cut_checkpoint(source.folder, segments, out)
    except ModelError as error:  # a class that is no language model by transformers' own mappings
        return Verdict("refused", f"on disk: {error.message} / {error.hint}")
    if trouble := _reload_trouble(cut, out, source.generates):
        return Verdict("wrong", f"on disk: {trouble}")
    indices = json.loads((out / "config.json").read_text())["original_layer_index"]
    if indices != list(cut.config.original_layer_index) or len(indices) != len(find_decoder(cut)):
        return Verdict("wrong", f"original_layer_index is {indices}")
    return Verdict("right")


def _judge_refusal(source: Original, cut: Any, segments: Sequence[Segment], out: Path, error: LayercutError) -> Verdict:
    """A refusal must be a SurgeryError with a hint, leave the model as it was, and be the same on disk."""
    if not isinstance(error, SurgeryError) or not error.hint or len(error.message) < 30:
        return Verdict("wrong", f"a refusal that does not help: {type(error).__name__} {error.message} / {error.hint}")
    if fingerprint(cut) != fingerprint(source.model) or cut.config.to_dict() != source.model.config.to_dict():
        return Verdict("wrong", "refused after the model had been changed")
    try:
        cut_checkpoint(source.folder, segments, out)
    except SurgeryError:
        return Verdict("refused", f"{error.message} / {error.hint}")
    return Verdict("wrong", f"refused in memory but not on disk: {error.message}")


# --- the reference --------------------------------------------------------------------------------


def logits_of(model: Any, **inputs: Any) -> torch.Tensor:
    """Logits [B, T, V] without a cache."""
    with torch.no_grad():
        return model(input_ids=families.tokens(), use_cache=False, **inputs).logits


def reference_logits(model: Any, segments: Sequence[Segment]) -> torch.Tensor:
    """Logits of the model with the layers of `segments` made the identity."""
    removed = [i for s in segments for i in range(s.start, s.stop)]
    if model.config.model_type == "xlm":  # layers spread over four lists
        with _skipped_xlm(model.transformer, removed):
            return logits_of(model)
    layers = list(find_decoder(model).layers.children())
    with skipped([layers[i] for i in removed]):
        return logits_of(model)


@contextmanager
def _skipped_xlm(stack: Any, removed: Sequence[int]) -> Iterator[None]:
    parts = [(part[i], norm) for i in removed for part, norm in (
        (stack.attentions, False), (stack.ffns, False), (stack.layer_norm1, True), (stack.layer_norm2, True),
    )]  # fmt: skip

    def skip(forward: Any, norm: bool) -> Any:
        def skipping(x: Any, *args: Any, **kwargs: Any) -> Any:
            output = forward(x, *args, **kwargs)
            nothing = x if norm else torch.zeros_like(x)
            return (nothing, *output[1:]) if isinstance(output, tuple) else nothing

        return skipping

    for part, norm in parts:
        part.forward = skip(part.forward, norm)
    try:
        yield
    finally:
        for part, _ in parts:
            del part.forward


@contextmanager
def skipped(layers: Sequence[Any]) -> Iterator[None]:
    """Let layers hand on what they were given: the first tensor among their inputs, in the shape of their output."""
    for layer in layers:
        layer.forward = _identity(layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _identity(forward: Callable[..., Any]) -> Callable[..., Any]:
    def identity(*args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
        output = forward(*args, **kwargs)
        if isinstance(output, tuple):
            bound = inspect.signature(forward).bind(*args, **kwargs).arguments
            if "prev_router_hidden_states" in bound:  # Zaya hands a second stream from layer to layer
                return (given, bound["prev_router_hidden_states"])
            if "prev_attn_output" in bound and hasattr(output, "_replace"):  # Reformer has two streams
                return output._replace(attn_output=bound["prev_attn_output"], hidden_states=bound["hidden_states"])
            return (given, *output[1:])
        if isinstance(output, list):
            return [given, *output[1:]]
        return given

    return identity


def fingerprint(model: Any) -> float:
    """A number that changes when any weight does."""
    weights = [t for t in model.state_dict().values() if t.dtype.is_floating_point]
    return sum(t.double().abs().sum().item() * (i + 1) for i, t in enumerate(weights))


# --- what can go wrong ----------------------------------------------------------------------------


def _logits_trouble(model: Any, wanted: torch.Tensor, error: float = 0.0) -> str:
    got = logits_of(model)
    if got.shape != wanted.shape:
        return f"logits {tuple(got.shape)} instead of {tuple(wanted.shape)}"
    same = torch.allclose(got, wanted, atol=error, rtol=error) if error else torch.equal(got, wanted)
    return "" if same else f"logits differ by up to {(got - wanted).abs().max().item():.2g}"


def _reload_trouble(model: Any, folder: Path, generates: bool) -> str:
    """Load a folder in the stock class and hold it against the model it should be."""
    try:
        loaded, info = type(model).from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    except Exception as error:
        return f"cannot be loaded: {type(error).__name__}: {str(error)[:200]}"
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            return f"{kind}: {sorted(map(str, info[kind]))[:3]}"
    _align_(loaded)
    if trouble := _logits_trouble(loaded.eval(), logits_of(model), tolerance(model.config)):
        return trouble
    return generation_trouble(loaded, model) if generates else ""


def _align_(model: Any) -> None:
    """Move weights out of the file's mapping, where they may lie at odd addresses and round otherwise."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()


def generation_trouble(model: Any, other: Any = None) -> str:
    """Greedy generation with the cache must be what it is without, beyond the sliding window."""
    try:
        tokens, scores = _written(model)
    except Exception as error:
        return f"cached generation raises {type(error).__name__}: {str(error)[:120]}"
    wanted, theirs = _generate(model, use_cache=False) if other is None else _written(other)
    if tokens.tolist() != wanted.tolist():
        return "cached generation differs"
    away = (scores - theirs).abs().max()
    return f"scores of cached generation differ by {away:.2g}" if away > 1e-3 * theirs.abs().max().clamp(min=1) else ""


_WRITTEN: WeakKeyDictionary[Any, tuple[torch.Tensor, torch.Tensor]] = WeakKeyDictionary()


def _written(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What a model generates with the cache, once for all that is held against it."""
    if model not in _WRITTEN:
        _WRITTEN[model] = _generate(model, use_cache=True)
    return _WRITTEN[model]


def _generate(model: Any, *, use_cache: bool) -> tuple[torch.Tensor, torch.Tensor]:
    prompt = families.tokens(length=5, batch=1)
    with torch.no_grad():
        result = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1, use_cache=use_cache, output_scores=True,
            return_dict_in_generate=True, pad_token_id=0,
        )  # fmt: skip
    scores = torch.stack(result.scores)
    return result.sequences, torch.where(scores.isfinite(), scores, torch.zeros_like(scores))
