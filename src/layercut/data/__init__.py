"""Text becomes token blocks: sources, documents, and which text is for which use."""

from layercut.data.blocks import token_blocks

__all__ = ["token_blocks"]
