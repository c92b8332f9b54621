"""The pruned model as files that other software reads: a stock checkpoint or a GGUF file, verified."""

from layercut.export.checkpoint import Exported, save

__all__ = ["Exported", "save"]
