"""Hand the result over: a stock checkpoint or a GGUF file, read back by those who will use it."""
