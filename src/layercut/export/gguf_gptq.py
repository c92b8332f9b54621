"""GPTQ for GGUF files: the scales as llama.cpp chose them, the codes so that later columns make up for earlier errors.

llama.cpp rounds every weight for itself, or with the importance of its column; GPTQ (Frantar et al., 2210.17323) takes
into account what the columns have to do with each other. The file's layout, size and readers stay the same.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from layercut.errors import ModelError
from layercut.export.ggml_codes import LAYOUTS, grid_of, with_codes
from layercut.export.gguf_check import readable, weights_in
from layercut.export.gguf_tensors import architecture_of, file_rows, possible_names
from layercut.models import loading
from layercut.models.gguf_header import open_gguf
from layercut.models.memory import memory_limit
from layercut.models.runner import DecoderRunner
from layercut.progress import bar, say
from layercut.quantization.gptq import gptq
from layercut.quantization.layer_by_layer import each_with_hessian
from layercut.surgery import cut_gguf

REWRITTEN = "rewritten.gguf"


@torch.no_grad()
def choose_codes_(file: Path, model: Any, tokens: torch.Tensor, rounded: Collection[str]) -> list[str]:
    """Choose the codes of matrices in a GGUF file again, by GPTQ on the file's own scales.

    Args:
        file: the file; replaced when all is chosen.
        model: a causal LM of transformers, what the file's weights were before they were rounded.
        tokens: calibration token ids [N, T].
        rounded: names of the parameters that were.

    Returns:
        Names of the parameters that have other codes now: matrices of linear modules in the decoder layers, of the
        types of `LAYOUTS`. None where the model cannot be run layer by layer, which is said.
    """
    tensors = {tensor.name: tensor for tensor in open_gguf(file)[1].tensors}
    names = {n: name for n, name in possible_names(model, architecture_of(file)).items() if n in rounded and name}
    wanted = {n: tensors[name] for n, name in names.items() if tensors[name].tensor_type.name.lower() in LAYOUTS}
    student = loading.share(model).eval()
    layers = _by_layer(student, wanted)
    if not layers:
        return []
    try:
        stack = DecoderRunner(student)
    except ModelError as error:
        say("note", f"rounded weight by weight, not by GPTQ: {error.message}")
        return []
    others = [name for name in rounded if name not in {f"{m}.weight" for group in layers.values() for m in group}]
    if readable(architecture_of(file)):  # what the layers before a weight will compute
        loading.replace_parameters_(student, weights_in(file, student, others))
    replaced = dict[str, tuple[Any, Any]]()
    with memory_limit(), bar("choosing codes", max(layers) + 1) as advance:
        for _, module, hessian in each_with_hessian(stack, tokens, layers, advance):
            if hessian is None:
                continue
            parameter = f"{module}.weight"
            tensor, weight = wanted[parameter], student.get_parameter(parameter)
            order = file_rows(tensor.name, architecture_of(file), model.config, len(weight)).numpy()
            packed = np.empty_like(tensor.data)
            packed[order] = tensor.data  # in the model's order of rows
            chosen, points = _chosen(packed, tensor.tensor_type, weight, hessian)
            loading.replace_parameters_(student, {parameter: points.to(weight.dtype)})
            replaced[tensor.name] = (chosen[order], tensor.tensor_type)
    again = file.with_name(REWRITTEN)
    again.unlink(missing_ok=True)
    cut_gguf(file, [], again, replaced=replaced)
    again.replace(file)
    return sorted(n for n, name in names.items() if name in replaced)


def _by_layer(model: Any, parameters: Collection[str]) -> dict[int, list[str]]:
    """Linear modules with one of these weights, by decoder layer."""
    decoder = loading.find_decoder(model)
    found: dict[int, list[str]] = {}
    for i, layer in enumerate(decoder.layers):
        inside = (name for name, module in layer.named_modules() if isinstance(module, nn.Linear))
        names = [full for name in inside if f"{(full := f'{decoder.path}.{i}.{name}')}.weight" in parameters]
        if names:
            found[i] = names
    return found


def _chosen(
    packed: np.ndarray, kind: Any, weight: torch.Tensor, hessian: torch.Tensor
) -> tuple[np.ndarray, torch.Tensor]:
    """Rows with the codes of GPTQ, and the weights that they stand for; rows with a block of scale 0 as they were."""
    from gguf import quants

    grid, found = grid_of(packed, kind, weight.shape[1]), packed.copy()
    rows = grid.scale.isfinite().all(1).nonzero().flatten()
    codes = gptq(weight.cpu()[rows], hessian.cpu(), grid.rows(rows)).int() - grid.lowest
    found[rows] = with_codes(packed[rows], kind.name.lower(), codes.numpy())
    return found, torch.from_numpy(quants.dequantize(found, kind)).to(weight.device)
