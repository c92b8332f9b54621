"""Text becomes token blocks: sources, documents, and which text serves which use."""
