"""A GGUF file of a model, as `layercut export` writes it, for llama.cpp."""

from __future__ import annotations

from pathlib import Path

from engines.environments import NotInstalledError, converter
from engines.models import Case
from layercut.config import ExportConfig
from layercut.errors import LayercutError
from layercut.pipeline.handover import export


def gguf_of(case: Case) -> Path | str:
    """A file of float32 weights; or why layercut writes none."""
    out = case.folder.with_suffix(".gguf")
    try:
        config = ExportConfig(out=out, gguf_type="f32", converter=converter(), force=True)
        return export(str(case.folder), config)
    except NotInstalledError as error:
        return f"llama.cpp's converter: {error}"
    except LayercutError as error:
        return f"layercut: {error.message}".replace(str(case.folder.parent) + "/", "")
