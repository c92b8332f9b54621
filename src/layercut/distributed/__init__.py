"""Several processes that do one run together, and weights sharded over them."""
