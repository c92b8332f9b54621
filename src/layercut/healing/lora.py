"""LoRA on all linear maps of all layers, merged in (`--train lora`).

LoRA (Hu et al., 2106.09685): a frozen W becomes W + (alpha / r) B A, A [r, in] random and B [out, r] zero, so that
training starts from the model as it is. The adapters are peft's, an extra: `pip install 'layercut[lora]'`. The loop of
endpoint tuning trains them. The merged weights are the student's own: what a dense model shares with it stays.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from layercut.errors import ConfigError, ModelError
from layercut.models.decoder_stack import find_decoder, weight_as_stored
from layercut.models.runner import DecoderRunner
from layercut.progress import say

RANK = 32
ALPHA = 2 * RANK
LEARNING_RATE = 1e-3  # the best of three on SmolLM2-135M at this rank (research/healing.py)
RECIPE = [RANK, ALPHA, LEARNING_RATE]  # what of it decides the result
PLAIN = ("Linear", "Conv1D", "FalconLinear")
"""Classes of modules that are a linear map and no more; another subclass may be a router."""
NAME = "default"  # what peft calls the adapters


def check_lora(model: Any) -> None:
    """Refuse what cannot be done, before anything is; and say what of the layers would be left as it is."""
    try:
        import peft  # noqa: F401
    except ImportError:
        words = "LoRA needs peft, and that is not installed"
        raise ConfigError(words, "pip install 'layercut[lora]', or in a checkout: pip install '.[lora]'") from None
    layers = find_decoder(model).layers
    adapted = sum(each.weight.numel() for maps in _own_maps(layers) for each in maps.values())
    if not adapted:
        raise ModelError("no layer of the model has a linear map that LoRA takes", "leave lora out")
    matrices = {id(p): p.numel() for layer in layers for p in layer.parameters() if p.dim() > 1}
    if (share := adapted / sum(matrices.values())) < 0.98:
        say("note", f"LoRA adapts {share:.0%} of the layers' matrices: experts that are one tensor, and what several "
            "layers share, have no linear map of their own")  # fmt: skip


def adapters_(layers: Sequence[nn.Module]) -> list[nn.Parameter]:
    """Put adapters beside every linear map of layers, but for what several of them share."""
    from peft import LoraConfig, inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # A is random
        for layer, maps in zip(layers, _own_maps(layers), strict=True):
            if maps:
                exactly = "|".join(map(re.escape, maps))  # a list of names would take others that end alike
                turned = not all(isinstance(each, nn.Linear) for each in maps.values())  # GPT-2's weights are [in, out]
                how = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=exactly, fan_in_fan_out=turned)
                inject_adapter_in_model(how, layer, NAME)
    return [p for layer in layers for name, p in layer.named_parameters() if "lora_" in name]


def _own_maps(layers: Sequence[nn.Module]) -> list[dict[str, Any]]:
    """Of each layer the linear maps, by name, that no other layer has.

    Without the output map of a state-space mixer, whose kernels read the weight themselves and pass adapters over.
    """
    holders = Counter(id(p) for layer in layers for p in layer.parameters())
    found = []
    for layer in layers:
        mixers = {f"{name}.".lstrip(".") for name, each in layer.named_modules() if hasattr(each, "A_log")}
        unread = {f"{mixer}out_proj" for mixer in mixers}
        maps: dict[str, Any] = {name: each for name, each in layer.named_modules() if type(each).__name__ in PLAIN}
        found.append({n: each for n, each in maps.items() if n not in unread and holders[id(each.weight)] == 1})
    return found


@torch.no_grad()
def merge_(student: DecoderRunner) -> None:
    """Put W + (alpha / r) B A in the place of every adapted linear map; the sum is taken in float32.

    peft's own merge adds to W in place, which the dense model shares.
    """
    from peft.tuners.lora import LoraLayer

    for layer in student.layers:
        adapted = [(name, module) for name, module in layer.named_modules() if isinstance(module, LoraLayer)]
        for name, module in adapted:
            base: Any = module.get_base_layer()
            for adapter in (module.lora_A, module.lora_B):
                adapter.float()
            whole = base.weight.float() + module.get_delta_weight(NAME)
            saved_in = weight_as_stored(base.weight.detach(), student.stored_dtype).dtype
            base.weight = nn.Parameter(whole.to(saved_in).to(base.weight.dtype), requires_grad=False)
            layer.set_submodule(name, base)
