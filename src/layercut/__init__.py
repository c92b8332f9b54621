"""layercut: find the run of decoder layers a language model can best do without, cut it out, heal, prove."""

__version__ = "0.1.0"
