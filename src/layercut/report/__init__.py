"""What a run found, as a page, a model card and the terminal's closing table."""
