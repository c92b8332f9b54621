"""Several processes that do one run together, and weights spread over them."""
