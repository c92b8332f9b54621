"""Models: from a name to files, to a model in memory, to its decoder layers run one by one."""

from layercut.models.losses import Objective
from layercut.models.memory import memory_limit
from layercut.models.runner import DecoderRunner

__all__ = ["DecoderRunner", "Objective", "memory_limit"]
