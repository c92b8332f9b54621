"""Models of a caller as layercut runs them: in eval mode, without gradients, layer by layer; and as they were after.

Between a public function, which takes any causal language model in memory, and the rooms, which take runners.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from layercut.errors import ModelError
from layercut.models.memory import memory_limit
from layercut.models.runner import DecoderRunner


def model_of(given: Any) -> Any:
    """The model that a caller gives, itself or in a `DecoderRunner`."""
    if isinstance(given, DecoderRunner):
        return given.at_rest
    if hasattr(given, "merge_and_unload"):
        raise ModelError(
            f"a {type(given).__name__} is given as a model: what peft's adapters stand around",
            "model.merge_and_unload() gives the model with the adapters in its weights",
        )
    if not isinstance(given, nn.Module) or not hasattr(getattr(given, "config", None), "get_text_config"):
        raise ModelError(
            f"a {type(given).__name__} is given as a model, and is no language model of transformers in memory",
            "AutoModelForCausalLM.from_pretrained(name)",
        )
    return given


@contextmanager
def prepared(*models: Any) -> Iterator[list[DecoderRunner]]:
    """Runners of models, which while open are in eval mode and need no gradients.

    On exit, also after an error, every module has its training mode and every parameter, by name, its
    `requires_grad` again: also one that was put in meanwhile in the place of another.
    """
    at_rest = [model_of(model) for model in models]
    flags = [{name: p.requires_grad for name, p in model.named_parameters()} for model in at_rest]
    # in inference mode nothing can be trained
    within = torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
    with memory_limit(), in_eval_mode(*at_rest), within:
        try:
            for model in at_rest:
                _set_flags_(model, {})
            yield [model if isinstance(model, DecoderRunner) else DecoderRunner(model) for model in models]
        finally:
            for model, before in zip(at_rest, flags, strict=True):
                _set_flags_(model, before)


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


def _set_flags_(model: nn.Module, flags: dict[str, bool]) -> None:
    """`requires_grad` of every parameter by name, False where it is not given."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad != flags.get(name, False):
            parameter.requires_grad_(flags.get(name, False))
