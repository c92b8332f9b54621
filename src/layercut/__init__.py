"""layercut: find the decoder layers that a language model can best do without, cut, heal, quantize, prove.

    import layercut as lc

    tokens = lc.token_blocks("c4", tokenizer, tokens=16384)      # [N, T] token ids, or a tensor of your own
    tests = lc.probe_rows(tokenizer)                             # of recall and more, for the cut to keep
    found = lc.search(model, tokens, ratio=0.2, num_segments="auto", probes=tests)  # nothing is changed yet
    small = lc.cut(model, found.segments)                        # a clone that shares all weights with `model`
    lc.fold_(small, model, tokens)                               # least squares, kept only where held-out KL falls
    lc.tune_(small, model, more_tokens)                          # cutoff endpoint tuning
    packed = lc.quantize(small, tokens, bits=4)
    lc.evaluate(packed, heldout, baseline=model)
    lc.save(packed, tokenizer, "out")                            # a stock checkpoint, verified by a fresh process

    run = lc.compress("org/model", ratio=0.2, out="runs/mine")   # all of it, resumable; what the command calls

`model` is any causal language model of transformers that is in memory. Nothing is written but what is asked for, and
nothing of the process is changed: no signal handlers, no output but a bar of tqdm in notebooks. Messages go to the
logger "layercut", progress to `lc.progress_to(callback)`. torch is imported when one of these is used, not before.
"""

from __future__ import annotations

import importlib
import random
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "token_blocks": "data.blocks", "probe_rows": "data.probes", "ProbeRows": "data.probes",
    "search": "layer_search", "SearchResult": "layer_search", "Candidate": "layer_search", "Cost": "layer_search",
    "capability_map": "layer_search", "CapabilityMap": "layer_search",
    "cut": "surgery",
    "fold_": "healing", "tune_": "healing", "FoldResult": "healing", "TuningResult": "healing",
    "quantize": "quantization", "Quantized": "quantization",
    "evaluate": "evaluation", "Evaluation": "evaluation", "capability_figures": "evaluation",
    "CapabilityFigures": "evaluation",
    "save": "export", "Exported": "export",
    "compress": "run", "RunResult": "run",
    "Segment": "segments", "DecoderRunner": "models.runner", "Objective": "models.losses",
    "criteria": "registries", "objectives": "registries", "quantizers": "registries", "evaluations": "registries",
    "exporters": "registries",
    "progress_to": "progress", "LayercutError": "errors", "memory_limit": "models.memory",
}  # fmt: skip
"""Public name -> the module that has it."""

__all__ = [*_WHERE, "__version__"]

if TYPE_CHECKING:
    # isort: off
    from layercut.data.blocks import token_blocks as token_blocks
    from layercut.data.probes import ProbeRows as ProbeRows, probe_rows as probe_rows
    from layercut.errors import LayercutError as LayercutError
    from layercut.evaluation import CapabilityFigures as CapabilityFigures, Evaluation as Evaluation
    from layercut.evaluation import capability_figures as capability_figures, evaluate as evaluate
    from layercut.export import Exported as Exported, save as save
    from layercut.healing import FoldResult as FoldResult, TuningResult as TuningResult, fold_ as fold_
    from layercut.healing import tune_ as tune_
    from layercut.layer_search import Candidate as Candidate, CapabilityMap as CapabilityMap, Cost as Cost
    from layercut.layer_search import SearchResult as SearchResult, capability_map as capability_map, search as search
    from layercut.models.losses import Objective as Objective
    from layercut.models.memory import memory_limit as memory_limit
    from layercut.models.runner import DecoderRunner as DecoderRunner
    from layercut.progress import progress_to as progress_to
    from layercut.quantization import Quantized as Quantized, quantize as quantize
    from layercut.registries import criteria as criteria, evaluations as evaluations, exporters as exporters
    from layercut.registries import objectives as objectives, quantizers as quantizers
    from layercut.run import RunResult as RunResult, compress as compress
    from layercut.segments import Segment as Segment
    from layercut.surgery import cut as cut
    # isort: on


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'layercut' has no attribute {name!r}")
    state = random.getstate()  # rich draws from it as it is imported
    try:
        value = globals()[name] = getattr(importlib.import_module(f"layercut.{_WHERE[name]}"), name)
    finally:
        random.setstate(state)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
