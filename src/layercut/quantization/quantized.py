"""What quantization did: to the model, and to each weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from layercut.models.decoder_stack import replace_parameters_
from layercut.quantization.packing import quantized_weights


@dataclass(frozen=True)
class QuantizedWeight:
    """What became of one weight W [O, I], Q after rounding."""

    name: str
    """Dotted name of its module."""
    method: str
    """The quantizer: "gptq", "rtn" or another's name."""
    bits: int
    group_size: int
    """Columns that share a scale."""
    bytes: int
    """Codes, scales and zero points, as stored."""
    weight_error: float
    """||W - Q||² / ||W||²"""
    output_error: float | None
    """||(W - Q) X'||² / ||W X'||² on the calibration inputs X; None where it was not calibrated."""
    rtn_output_error: float | None
    """The same of rounding to nearest."""


@dataclass(frozen=True)
class Quantized:
    """A model with rounded weights, and the tensors that a checkpoint stores in their place."""

    model: Any = field(repr=False)
    """A plain causal LM whose weights are the rounded ones, to the bit those that a loader computes."""
    packed: Mapping[str, torch.Tensor] = field(repr=False)
    """The stored tensors by name, as compressed-tensors packs them; on the CPU."""
    config: Mapping[str, Any] = field(repr=False)
    """`quantization_config` for config.json."""
    weights: tuple[QuantizedWeight, ...] = field(repr=False)
    """In the order in which they were rounded."""
    left: tuple[str, ...]
    """Matrices in the decoder layers that stay as they were, such as routers."""
    bytes_before: int
    """All weights as saved, tied ones counted once."""
    bytes_after: int
    settings: Mapping[str, Any]
    """What was asked: bits, quantizer, group_size, embedding_bits, bits_allowed; and whether there are zero_points."""
    mixture: Mapping[str, Any] | None = field(default=None, repr=False)
    """Where bits were chosen for a size: the estimated KL of all together, and of each weight at each width."""

    def to_dict(self) -> dict[str, Any]:
        """Everything but the model and its tensors, fit for JSON; what a run keeps as quantize.json."""
        return {
            **self.settings,
            "mixture": self.mixture and dict(self.mixture),
            "layers": [asdict(row) for row in self.weights],
            "left": list(self.left),
            "bytes": {"before": self.bytes_before, "after": self.bytes_after},
            "quantization_config": dict(self.config),
        }

    @classmethod
    def restored(cls, model: Any, packed: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> Quantized:
        """From packed tensors and `to_dict`; `model`, as it was before it was rounded, is changed in place."""
        own = dict(facts)
        mixture, weights, left, size, config = (
            own.pop(name) for name in ("mixture", "layers", "left", "bytes", "quantization_config")
        )
        replace_parameters_(model, quantized_weights(packed, config))
        rows = tuple(QuantizedWeight(**row) for row in weights)
        return cls(model, packed, config, rows, tuple(left), size["before"], size["after"], own, mixture)
