"""Files: read within limits, written whole or not at all, and the JSON of a run."""
