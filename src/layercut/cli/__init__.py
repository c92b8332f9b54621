"""The command `layercut`: parse, call, print."""

from layercut.cli.command_line import app, main

__all__ = ["app", "main"]
