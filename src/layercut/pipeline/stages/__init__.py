"""The stages of a run; `pipeline/journey.py` says in which order.

    text.py      draws every token of a run
    size_budgets.py  of a size, how many layers go and in how many bits the others are stored
    search.py    finds the segments to remove
    heal.py      cuts, folds, tunes
    quantize.py  stores the weights in fewer bits, and trains what was rounded
    evaluate.py  perplexity, generations, speed, tasks, long context
    export.py    writes the stock checkpoint, and has a fresh process read it

A stage is a function of the `RunContext`. It says what it depends on, calls into its room where its
artefact is not there yet, says a line about it, and returns the artefact:

    def count(work: RunContext, segments: Sequence[Segment]) -> CountArtefact:
        with work.run.stage(CountArtefact, "count", [work.text["evaluation"]], after=["quantize"]) as stage:
            if stage.open:
                model = work.compressed(segments)
                stage.found = CountArtefact(parameters=loading.parameter_count(model))
        say("count", f"{stage.artefact.parameters:,} parameters")
        return stage.artefact

Among the inputs is what the stage uses and no more, so that a changed flag runs again just what depends on it; of text
it uses the tokens, whatever flags they came by. `CountArtefact` is a dataclass in `pipeline/artefacts.py`.
"""

from layercut.pipeline.stages import evaluate, export, heal, quantize, search, size_budgets, text

__all__ = ["evaluate", "export", "heal", "quantize", "search", "size_budgets", "text"]
