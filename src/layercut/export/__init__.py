"""What is left as files that other software reads: a stock checkpoint, verified by a fresh process, or GGUF.

Last stage of the journey. `checkpoint.py`: a folder of safetensors. `gguf_export.py`, `gguf_tensors.py` and
`gguf_check.py`: a GGUF file, its tensors, and whether it is the model that it should be. `formats.py`: how
`layercut export` finds a format, and what a format of a package's own must look like.
"""

from layercut.export.checkpoint import Exported, save

__all__ = ["Exported", "save"]
