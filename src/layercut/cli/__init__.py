"""The command `layercut`: parse, call, print."""

from layercut.cli.main import main

__all__ = ["main"]
