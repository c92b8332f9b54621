"""Text becomes token blocks: sources, documents, which text is for which use, and probes of a model."""

from layercut.data.blocks import token_blocks
from layercut.data.probes import ProbeRows, probe_rows

__all__ = ["ProbeRows", "probe_rows", "token_blocks"]
