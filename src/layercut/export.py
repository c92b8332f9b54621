"""Hand the result over: a stock Hugging Face folder, proved by a fresh process that knows nothing of layercut."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from layercut.errors import RunError
from layercut.models import quiet_transformers
from layercut.runs import replace_folder

CHECKER = Path(__file__).with_name("reload_check.py")


class ReloadError(Exception):
    """The saved model is not the model in memory. A fault of ours: never shown as the user's."""


def export_checkpoint(model: Any, tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Save model, tokenizer and generation config; verify; only then put the folder in its place.

    Returns {"bytes": of the weight files, "check": what the fresh process saw}. Raises RunError where the disk
    does not let us, ReloadError where the reloaded model differs.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with quiet_transformers():
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        check = verify_reload(model, partial)
        replace_folder(partial, folder)
    except OSError as error:
        raise RunError(
            f"{folder} cannot be written: {error.strerror or error}", "free some space, or name another --out"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {"bytes": size, "check": check}


@torch.no_grad()
def verify_reload(model: Any, folder: Path) -> dict[str, Any]:
    """Load the folder in a new process with stock transformers and compare with the model in memory.

    Logits must be equal to the bit in the saved number format; greedy generation with the cache must give the
    tokens that full forwards without it give (in float32, where ties are not made by rounding).
    """
    parameter = next(model.parameters())
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, (2, 32), generator=torch.Generator().manual_seed(0))
    logits = model(input_ids=tokens.to(parameter.device), use_cache=False).logits
    with tempfile.TemporaryDirectory() as scratch:
        expected = Path(scratch) / "expected.safetensors"
        save_file({"tokens": tokens, "logits": logits.cpu().contiguous()}, expected)
        command = [sys.executable, "-I", str(CHECKER), str(folder), str(expected)]
        command += [str(parameter.device), str(parameter.dtype).removeprefix("torch."), str(torch.get_num_threads())]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise ReloadError(f"the saved model does not reload as it was: {lines[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


