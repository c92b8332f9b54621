"""Text becomes token blocks: sources, documents, which text is for which use, and probes of a model."""
