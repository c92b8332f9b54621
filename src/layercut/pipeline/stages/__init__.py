"""What the stages of a journey do; `pipeline/journey.py` says in which order and what each depends on.

    text.py      draws every token of a run
    search.py    finds the segments to remove
    heal.py      cuts, folds, tunes
    quantize.py  stores what is left in fewer bits
    evaluate.py     perplexity, generations, speed, tasks, long context
    export.py    writes the stock checkpoint, and has a fresh process read it

A stage is a function of the workbench: it takes the tokens and the models it needs from there, calls into its room, and
returns its artefact.
"""

from layercut.pipeline.stages import evaluate, export, heal, quantize, search, text

__all__ = ["evaluate", "export", "heal", "quantize", "search", "text"]
