"""Run by itself, in a fresh process, by `gguf_check.by_llama_cpp`: what llama.cpp computes from a GGUF file.

Uses llama-cpp-py-sync and numpy alone. FOLDER holds tokens.npy [N, T], long.npy [M] and text.txt, and gets logits.npy,
those of the first window [T, V], and long_logits.npy, those of the last positions of the long row [LAST, V]. Prints one
line of JSON: the mean loss of next tokens, the prompt's length and what was written after it token by token through the
cache, and the ids of the text.

    python llama_cpp_process.py FILE.gguf FOLDER THREADS LAST
    python llama_cpp_process.py speed THREADS FILE.gguf OTHER.gguf

Without LAST the mean loss on tokens.npy alone is computed and printed. `speed` times both files, by turns.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
from llama_cpp_py_sync import __version__
from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

PROMPT, NEW_TOKENS = 8, 24
TIMED, ROUNDS = 32, 8  # tokens that are decoded in a round of timing, after one round that warms up
AT_ONCE = 512  # tokens computed at once, which bounds the memory that attention takes
FLOAT32 = 0
ERROR = 4  # llama.cpp's level of messages that are errors


class Model:
    """A GGUF file in llama.cpp; `exact`: keys and values in float32, so that only weights and products are rounded."""

    def __init__(self, file, positions, threads, exact=True):
        self.ffi, self.lib = get_ffi(), get_lib()
        self.log = self.ffi.callback("void(enum ggml_log_level, const char *, void *)", self.heard)
        self.lib.llama_log_set(self.log, self.ffi.NULL)
        self.lib.llama_backend_init()
        settings = self.lib.llama_model_default_params()
        settings.n_gpu_layers = 0
        self.model = self.lib.llama_model_load_from_file(os.fsencode(file), settings)
        if self.model == self.ffi.NULL:
            sys.exit("it cannot load it")
        context = self.lib.llama_context_default_params()
        context.n_ctx = context.n_batch = positions
        context.n_ubatch = min(positions, AT_ONCE)
        context.n_threads = context.n_threads_batch = threads
        if exact:
            context.type_k = context.type_v = FLOAT32
            context.flash_attn_type = 0
        self.context = self.lib.llama_init_from_model(self.model, context)
        if self.context == self.ffi.NULL:
            sys.exit("it has not enough memory for it")
        self.vocabulary = self.lib.llama_model_get_vocab(self.model)
        self.size = self.lib.llama_vocab_n_tokens(self.vocabulary)

    def heard(self, level, text, _):
        """llama.cpp's log callback: errors go to stderr, all else nowhere."""
        if level == ERROR:
            sys.stderr.write(self.ffi.string(text).decode(errors="replace"))

    def logits(self, tokens, start=0, last=None):
        """Logits of the last tokens."""
        count = len(tokens)
        wanted = min(last or count, count)
        if start == 0:
            self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        batch = self.lib.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = int(token), start + i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, i >= count - wanted
        failed = self.lib.llama_decode(self.context, batch)
        self.lib.llama_batch_free(batch)
        if failed:
            sys.exit(f"it cannot compute {count} tokens")
        found = self.ffi.buffer(self.lib.llama_get_logits(self.context), 4 * wanted * self.size)
        return np.frombuffer(found, dtype=np.float32).reshape(wanted, self.size).copy()

    def ids(self, text):
        """Token ids of text in UTF-8, without any that llama.cpp puts before or after it."""
        room = self.ffi.new("llama_token[]", len(text) + 8)
        count = self.lib.llama_tokenize(self.vocabulary, text, len(text), room, len(text) + 8, False, False)
        return list(room[0 : max(count, 0)])


def loss(scores, tokens):
    """Sum of -log p(next token), in float64."""
    z = scores[:-1].astype(np.float64)
    highest = z.max(1)
    normaliser = highest + np.log(np.exp(z - highest[:, None]).sum(1))
    return float((normaliser - z[np.arange(len(z)), tokens[1:]]).sum())


def main(file, folder, threads, last=None):
    """Compute from FOLDER's tokens, write logits there, print the rest."""
    folder = Path(folder)
    windows = np.load(folder / "tokens.npy")
    long = windows[0] if last is None else np.load(folder / "long.npy")
    model = Model(file, max(windows.shape[1], len(long), PROMPT + NEW_TOKENS), int(threads))
    total = 0.0
    for i, window in enumerate(windows):
        scores = model.logits(window)
        if i == 0 and last is not None:
            np.save(folder / "logits.npy", scores)
        total += loss(scores, window)
    found = {"version": __version__, "loss": total / (windows.size - len(windows))}
    if last is not None:
        np.save(folder / "long_logits.npy", model.logits(long, last=int(last)))
        found |= greedy(model, windows[0, :PROMPT].tolist())
        found["ids"] = model.ids((folder / "text.txt").read_bytes())
    print(json.dumps(found))


def greedy(model, written):
    """What the model writes after a prompt, token by token through the cache."""
    prompt = len(written)
    token = int(model.logits(written)[-1].argmax())
    for _ in range(NEW_TOKENS):
        written.append(token)
        token = int(model.logits([token], start=len(written) - 1)[-1].argmax())
    return {"prompt": prompt, "new_tokens": NEW_TOKENS, "written": written}


def speed(threads, *files):
    """Tokens a second of each file in its fastest round, decoding one token at a time: other work only slows."""
    models = [Model(file, PROMPT + TIMED, int(threads), exact=False) for file in files]
    rounds = []
    for _ in range(ROUNDS + 1):
        taken = []
        for model in models:
            token = int(model.logits([1] * PROMPT, last=1)[-1].argmax())
            begun = time.perf_counter()
            for at in range(TIMED):
                token = int(model.logits([token], start=PROMPT + at)[-1].argmax())
            taken.append(time.perf_counter() - begun)
        rounds.append(taken)
    dense, compressed = (TIMED / min(taken[i] for taken in rounds[1:]) for i in (0, 1))
    ratio = compressed / dense
    print(json.dumps({"dense": dense, "compressed": compressed, "ratio": ratio, "threads": int(threads)}))


if __name__ == "__main__":
    speed(*sys.argv[2:]) if sys.argv[1] == "speed" else main(*sys.argv[1:])
