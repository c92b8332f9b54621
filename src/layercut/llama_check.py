"""Run by itself, in a fresh process, by `gguf_check.by_llama_cpp`: what llama.cpp computes from a GGUF file.

Uses llama-cpp-python and numpy alone. FOLDER holds tokens.npy [N, T] and text.txt, and gets logits.npy, those of the
first window [T, V]. Prints one line of JSON: the mean loss of next tokens, the prompt's length and what was written
after it token by token through the cache, and the ids of the text.

    python llama_check.py FILE.gguf FOLDER THREADS
"""

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np

PROMPT, NEW_TOKENS = 8, 24


def logits(model, tokens):
    """[T] -> [T, V] float32, each window from an empty cache."""
    model.reset()
    model.eval(tokens.tolist())
    return model.scores[: len(tokens)]


def loss(scores, tokens):
    """Sum of -log p(next token), in float64."""
    z = scores[:-1].astype(np.float64)
    highest = z.max(1)
    normaliser = highest + np.log(np.exp(z - highest[:, None]).sum(1))
    return float((normaliser - z[np.arange(len(z)), tokens[1:]]).sum())


def main(file, folder, threads):
    folder, threads = Path(folder), int(threads)
    windows = np.load(folder / "tokens.npy")
    length = windows.shape[1]
    model = llama_cpp.Llama(
        file, n_ctx=max(length, PROMPT + NEW_TOKENS), n_batch=length, logits_all=True, verbose=False,
        n_threads=threads, n_threads_batch=threads,
    )  # fmt: skip
    total = 0.0
    for i, window in enumerate(windows):
        scores = logits(model, window)
        if i == 0:
            np.save(folder / "logits.npy", scores)
        total += loss(scores, window)
    written = windows[0, :PROMPT].tolist()
    prompt = len(written)
    token = int(logits(model, windows[0, :PROMPT])[-1].argmax())
    for _ in range(NEW_TOKENS):
        written.append(token)
        model.eval([token])
        token = int(model.scores[model.n_tokens - 1].argmax())
    text = (folder / "text.txt").read_bytes()
    found = {
        "version": llama_cpp.__version__,
        "loss": total / (windows.size - len(windows)),
        "prompt": prompt,
        "new_tokens": NEW_TOKENS,
        "written": written,
        "ids": model.tokenize(text, add_bos=False, special=False),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
