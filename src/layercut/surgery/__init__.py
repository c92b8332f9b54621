"""Surgery: remove decoder layers from any architecture, in memory, in a checkpoint folder or in a GGUF file.

Third stage of the journey. A cut is either right, to the bit, or refused with the reason.
"""

from layercut.surgery.checkpoint_cut import check_checkpoint_cut, cut_checkpoint
from layercut.surgery.cut_plan import cut, cut_segment_
from layercut.surgery.gguf_writer import cut_gguf, names_after

__all__ = ["check_checkpoint_cut", "cut", "cut_checkpoint", "cut_gguf", "cut_segment_", "names_after"]
