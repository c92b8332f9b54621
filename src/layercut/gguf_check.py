"""Is a GGUF file the model that it should be? Asked of those who will read it, before the file takes its name.

Every weight is compared as transformers reads it. Where llama-cpp-python is installed, llama.cpp loads the file in a
fresh process (`llama_check.py`), and what it computes from text has to be what transformers computes from that file.
"""

from __future__ import annotations

import importlib.util
import io
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layercut.errors import LayercutError, ModelError, first_line
from layercut.models import as_stored, quiet_transformers

LARGEST_ERROR = {"f32": 1e-4, "f16": 1e-3, "bf16": 5e-3, "q8_0": 1.5e-2}
"""Relative error (Frobenius norm) of a weight that was written and read back. Rounding alone stays below a half of
these; a weight under the wrong name, or with its rows in the wrong order, is off by about 1.4."""
Q4_ERROR = 0.25
LARGEST_LOGIT_ERROR = {True: 0.25, False: 0.75}
"""Relative error of llama.cpp's logits, against transformers on the same file (True), or on the weights before they
were rounded (False). llama.cpp rounds what goes into its products to 8 bits, which costs a few hundredths; other
weights, or the right ones in another order, give 1 and more."""
CHECKER = Path(__file__).with_name("llama_check.py")
_TAKE_FOLDER = "take the checkpoint folder instead, and convert it with llama.cpp's own tools"


def readable(architecture: str) -> bool:
    """Whether transformers reads this architecture from GGUF."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    return architecture in GGUF_SUPPORTED_ARCHITECTURES


def read_by_transformers(file: Path) -> Any:
    """The model in a GGUF file, in float32. ModelError: it cannot be read."""
    from transformers import AutoModelForCausalLM

    with quiet_transformers(), redirect_stderr(io.StringIO()):
        try:
            model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        except LayercutError:
            raise
        except Exception as error:
            raise ModelError(f"{file.name} cannot be read back: {first_line(error)}", _TAKE_FOLDER) from error
    return model.requires_grad_(False).eval()


@torch.no_grad()
def compare_weights(name: str, read: Any, model: Any, rounded: Mapping[str, str]) -> dict[str, float]:
    """Compare every weight of `read`, a file called `name`, with `model`'s, in the number format that it is saved in.

    rounded: the GGML type, in lower case, of each parameter that was rounded when written; all others must be equal
    to the bit. Returns the relative errors of the rounded ones. ModelError: a weight is another than it should be.
    """
    theirs = dict(read.named_parameters())
    ours = dict(as_stored(model).named_parameters())
    if missing := ours.keys() ^ theirs.keys():
        raise ModelError(f"{name}, read back, differs in {min(missing)}", _TAKE_FOLDER)
    errors = {}
    for parameter, weight in ours.items():
        other = theirs[parameter]
        if parameter not in rounded:
            if not torch.equal(weight.cpu(), other.to(weight.dtype)):
                raise ModelError(f"{name}, read back, holds another {parameter}", _TAKE_FOLDER)
            continue
        kind = rounded[parameter]
        errors[parameter] = _distance(other, weight.cpu())
        if not errors[parameter] <= LARGEST_ERROR.get(kind, Q4_ERROR):
            raise ModelError(
                f"{name}, read back, is off by {errors[parameter]:.3g} in {parameter} ({kind}): "
                "layercut does not know how llama.cpp lays this architecture out",
                _TAKE_FOLDER,
            )
    return errors


def _distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """||found - wanted|| / ||wanted||"""
    return ((found.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-30)).item()


def llama_cpp_installed() -> bool:
    """Whether a fresh process would find llama-cpp-python."""
    return importlib.util.find_spec("llama_cpp") is not None


@torch.no_grad()
def by_llama_cpp(file: Path, reference: Any, tokenizer: Any, tokens: torch.Tensor, *, same: bool) -> dict[str, Any]:
    """What llama.cpp computes from the file in a fresh process, held against `reference`.

    same: whether the reference has the file's own weights, or those before rounding. "logit_error" is
    ||z - z'|| / ||z'|| over the first window, each position's mean taken out, since softmax does not see it; "greedy"
    counts llama.cpp's own next tokens that the reference finds likeliest as well, given the same text before.
    """
    text = tokenizer.decode(tokens[0], skip_special_tokens=True)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        np.save(scratch / "tokens.npy", tokens.numpy())
        (scratch / "text.txt").write_text(text, encoding="utf-8")
        command = [sys.executable, "-P", str(CHECKER), str(file), str(scratch), str(torch.get_num_threads())]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise ModelError(f"llama.cpp cannot use {file.name}: {lines[-1]}", _TAKE_FOLDER)
        found = json.loads(done.stdout.splitlines()[-1])
        theirs = torch.from_numpy(np.load(scratch / "logits.npy"))
    ours = _logits(reference, tokens[:1])[0]
    error = _distance(theirs - theirs.mean(-1, keepdim=True), ours - ours.mean(-1, keepdim=True))
    written = torch.tensor([found.pop("written")])
    likeliest = _logits(reference, written)[0, found["prompt"] - 1 : -1].argmax(-1)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    found["perplexity"] = math.exp(min(found.pop("loss"), 700.0))
    found |= {
        "logit_error": error,
        "same_top": (theirs.argmax(-1) == ours.argmax(-1)).float().mean().item(),
        "greedy": int((likeliest == written[0, found["prompt"] :]).sum()),
        "same_token_ids": found.pop("ids") == ids,
    }
    if not error <= LARGEST_LOGIT_ERROR[same]:
        raise ModelError(
            f"llama.cpp computes something else from {file.name}: its logits are off by {error:.3g}", _TAKE_FOLDER
        )
    return found


def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens.to(next(model.parameters()).device), use_cache=False).logits.float().cpu()
