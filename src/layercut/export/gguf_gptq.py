"""GPTQ for GGUF files: the codes so that later columns make up for earlier errors, exchanged then, scales fitted.

llama.cpp rounds every weight for itself, or with the importance of its column; GPTQ (Frantar et al., 2210.17323) takes
into account what the columns have to do with each other. It begins on the scales that llama.cpp chose, and keeps them
where a type packs them in six bits. The file's layout, size and readers stay the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from layercut.errors import ModelError
from layercut.export.ggml_codes import LAYOUTS, grid_of, with_codes, with_scales
from layercut.export.gguf_check import largest_error, readable, relative_distance, weights_in
from layercut.export.gguf_tensors import CONVERTED as FLOATS
from layercut.export.gguf_tensors import architecture_of, file_rows, possible_names, stored_types
from layercut.models import decoder_stack, model_weights
from layercut.models.gguf_header import open_gguf
from layercut.models.memory import memory_limit
from layercut.models.runner import DecoderRunner
from layercut.progress import bar, say
from layercut.quantization.coordinate_descent import descended
from layercut.quantization.gptq import gptq, with_ridge
from layercut.quantization.grid import Grid
from layercut.quantization.layer_by_layer import each_with_hessian
from layercut.quantization.scales import by_turns
from layercut.quantization.sensitivity import token_weights
from layercut.surgery import cut_gguf


@torch.no_grad()
def choose_codes_(file: Path, model: Any, tokens: torch.Tensor, rounded: Collection[str]) -> list[str]:
    """Choose the codes of matrices in a GGUF file again, by GPTQ, and scales that are a block's own."""
    tensors = {t.name: t for t in open_gguf(file)[1].tensors if t.tensor_type.name.lower() in LAYOUTS}
    student, architecture = model_weights.share(model).eval(), architecture_of(file)
    try:
        found = possible_names(student, architecture) if tensors else {}
        names = {parameter: name for parameter, name in found.items() if parameter in rounded and name}
        fit = {n for n, name in names.items() if name in tensors and tensors[name].shape[0] <= tokens.numel()}
        layers = _by_layer(student, fit)
        stack = DecoderRunner(student) if layers else None
    except ModelError as error:
        say("note", f"rounded weight by weight, not by GPTQ: {error.message}")
        return []
    if stack is None:
        return []
    modules = [module for group in layers.values() for module in group]
    with memory_limit():
        counts = {} if stack.on_disk else token_weights(student, tokens, modules)
    if readable(architecture):
        _round_the_others_(student, file, names, layers)
    replaced, unlike = dict[str, tuple[Any, Any]](), list[str]()
    with memory_limit(), bar("choosing codes", max(layers) + 1) as advance:
        for _, module, hessian in each_with_hessian(stack, tokens, layers, advance, counts):
            if hessian is None:
                continue
            parameter = f"{module}.weight"
            tensor, weight = tensors[names[parameter]], student.get_parameter(parameter)
            order = file_rows(tensor.name, architecture, model.config, len(weight)).numpy()
            packed = np.empty_like(tensor.data)
            packed[order] = tensor.data  # in the model's order of rows
            if not _is(packed, tensor.tensor_type, weight):
                unlike.append(parameter)
                continue
            chosen, points = _chosen(packed, tensor.tensor_type, weight, hessian)
            model_weights.replace_parameters_(student, {parameter: points.to(weight.dtype)})
            replaced[tensor.name] = (chosen[order], tensor.tensor_type)
    if unlike:
        say(
            "note",
            f"not by GPTQ: {len(unlike)} matrices, as {unlike[0]}, have other rows in the file, or another order",
        )
    if replaced:
        again = file.with_name(f"{file.stem}.recoded.gguf")
        again.unlink(missing_ok=True)
        cut_gguf(file, [], again, replaced=replaced)
        again.replace(file)
    return sorted(n for n, name in names.items() if name in replaced)


def _by_layer(model: Any, parameters: Collection[str]) -> dict[int, list[str]]:
    """Linear modules with one of these weights, by decoder layer."""
    decoder = decoder_stack.find_decoder(model)
    found: dict[int, list[str]] = {}
    for i, layer in enumerate(decoder.layers):
        inside = (name for name, module in layer.named_modules() if isinstance(module, nn.Linear))
        names = [full for name in inside if f"{(full := f'{decoder.path}.{i}.{name}')}.weight" in parameters]
        if names:
            found[i] = names
    return found


def _round_the_others_(student: Any, file: Path, names: Mapping[str, str], layers: Mapping[int, list[str]]) -> None:
    """Put in what the file has of rounded weights whose codes stay, so that later layers see it."""
    types, chosen = stored_types(file), {f"{module}.weight" for group in layers.values() for module in group}
    coarse = [n for n, name in names.items() if types.get(name, FLOATS[0]) not in FLOATS]
    model_weights.replace_parameters_(student, weights_in(file, student, [n for n in coarse if n not in chosen]))


def _is(packed: np.ndarray, kind: Any, weight: torch.Tensor) -> bool:
    """Whether rows of a file are these weights, rounded."""
    from gguf import quants

    found = torch.from_numpy(quants.dequantize(packed, kind))
    return relative_distance(found, weight.cpu()) <= largest_error(kind.name.lower())


def _chosen(
    packed: np.ndarray, kind: Any, weight: torch.Tensor, hessian: torch.Tensor
) -> tuple[np.ndarray, torch.Tensor]:
    """Rows with the codes of GPTQ and, where a block has scales of its own, those fitted; what they stand for."""
    from gguf import quants

    name, columns, plain, sums = kind.name.lower(), weight.shape[1], weight.cpu(), with_ridge(hessian.cpu())

    def stored(grid: Grid) -> Grid:
        return grid_of(with_scales(packed, name, grid), kind, columns)

    grid, again = grid_of(packed, kind, columns), partial(descended, plain, sums)
    own = bool(LAYOUTS[name].scales)
    grid, codes = by_turns(plain, sums, grid, gptq(plain, sums, grid), again, stored if own else None)
    packed = with_scales(packed, name, grid) if own else packed
    found = with_codes(packed, name, (codes.int() - grid.lowest).numpy())
    return found, torch.from_numpy(quants.dequantize(found, kind)).to(weight.device)
