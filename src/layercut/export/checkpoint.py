"""Hand the result over: a stock Hugging Face folder, proved by a fresh process that knows nothing of layercut.

A quantized model comes as a plain model whose weights are the rounded ones, and the packed tensors that stand for
them; saved are the packed ones, and a reload must compute the same logits to the bit.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from layercut.data.blocks import in_rows
from layercut.files.sizes import size
from layercut.files.writing import replace_folder, usual_mode_, writing
from layercut.models import checkpoints, memory
from layercut.models.loading import as_stored, quiet_transformers
from layercut.offload import layer_reader
from layercut.progress import bar

CHECKER = Path(__file__).with_name("reload_process.py")
STEP = "step: "
"""How a line of a checker begins that says what it does next."""
CHECK_TOKENS, CHECK_WINDOW = 4096, 256
"""Tokens of text, at most, that what was exported is measured on again."""


class ReloadError(Exception):
    """The saved model is not the model in memory. A fault of ours: never shown as the user's."""


def export_checkpoint(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    packed: dict[str, torch.Tensor] | None = None,
    quantization_config: dict[str, Any] | None = None,
    text: torch.Tensor | None = None,
) -> dict[str, Any]:
    """Save model, tokenizer and generation config; verify; only then put the folder in its place.

    packed: tensors to save for the weights of `model` that they stand for, which quantization_config describes.
    text: tokens [N, T] to measure perplexity on again, by the fresh process.
    Returns {"bytes": of the weight files, "check": what the fresh process saw}. Raises RunError where the disk
    does not let us, ReloadError where the reloaded model differs or a weight was saved twice.
    """
    model = as_stored(model)
    state = stored_state(model, packed or {})
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with writing(folder), quiet_transformers(), growing(partial, state):
            with described(model.config, quantization_config):
                # a copy: for some architectures transformers empties the dict that it is given
                model.save_pretrained(partial, state_dict=dict(state) if packed else None)
            tokenizer.save_pretrained(partial)
        usual_mode_(partial)
        check_bytes(partial, state)
        check = verify_reload(model, partial, text) if packed else verify(model, partial, text)
        with writing(folder):
            replace_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {"bytes": size, "check": check}


@contextmanager
def growing(folder: Path, state: dict[str, torch.Tensor]) -> Iterator[None]:
    """While open, a bar that follows how many bytes are in a folder into which the model is saved."""

    def written() -> float:
        return sum(file.stat().st_size for file in folder.glob("*.safetensors") if file.exists())

    with bar("saving", distinct_bytes(state), written):
        yield


def publish_streamed(model: Any, partial: Path, folder: Path) -> dict[str, Any]:
    """Put a checkpoint in its place that was written from files, once a fresh process has computed from it what this
    model, whose layers are on disk, computes. As `export_checkpoint` otherwise."""
    try:
        check = verify_streamed(model, partial)
        with writing(folder):
            replace_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {"bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")), "check": check}


def stored_state(model: Any, packed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's tensors by name, with packed ones in the place of the weights that they stand for."""
    quantized = {key.rpartition(".")[0] for key in packed}
    state = {name: t for name, t in model.state_dict().items() if name.removesuffix(".weight") not in quantized}
    return state | packed


@contextmanager
def described(config: Any, quantization_config: dict[str, Any] | None) -> Iterator[None]:
    """While open, the config says how the weights are quantized; the model in memory is a plain one."""
    if quantization_config is None:
        yield
        return
    config.quantization_config = quantization_config
    try:
        yield
    finally:
        del config.quantization_config


def check_bytes(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """ReloadError where the files hold more than the tensors do: a tie that came apart is saved twice."""
    expected, saved = distinct_bytes(state), 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = 8 + int.from_bytes(stream.read(8), "little")
        saved += file.stat().st_size - header
    if saved > expected:
        raise ReloadError(f"{saved:,} bytes of weights were saved, but the model has {expected:,}: a tie came apart")


def distinct_bytes(state: dict[str, torch.Tensor]) -> int:
    """Bytes of all tensors, one that has two names counted once."""
    return sum({(t.data_ptr(), t.nbytes): t.nbytes for t in state.values()}.values())


def verify(model: Any, folder: Path, text: torch.Tensor | None = None) -> dict[str, Any]:
    """`verify_reload`; where its process would not fit into memory beside this one, `verify_streamed`, and under "how"
    that it was so."""
    parameter, checkpoint = next(model.parameters()), checkpoints.resolve(str(folder))
    needed = sum(p.numel() for p in model.parameters()) * (parameter.itemsize + torch.float32.itemsize)
    if needed <= memory.available_bytes(parameter.device) or not layer_reader.read_by_layer(checkpoint, model.config):
        return verify_reload(model, folder, text)
    lacking = f"the {size(needed)} to load it whole were not free: layers left on disk, nothing generated"
    return verify_streamed(model, folder) | {"how": lacking}


def verify_reload(model: Any, folder: Path, text: torch.Tensor | None = None) -> dict[str, Any]:
    """Load the folder in a new process with stock transformers and compare with the model in memory.

    Logits must be equal to the bit in the saved number format; greedy generation with the cache must give the tokens
    that full forwards without it give (in float32, where ties are not made by rounding). Of `text` [N, T] the process
    measures the perplexity, in float32 as well: some CPUs take many times as long over narrower formats.
    """
    return _verified(model, folder, ["-P", str(CHECKER)], text)


def verify_streamed(model: Any, folder: Path) -> dict[str, Any]:
    """Open the folder in a new process with its layers left on disk and compare with the model.

    Logits must be equal to the bit. transformers' loader places each layer's weights, but they are never whole in
    the new process's memory, and nothing is generated.
    """
    return _verified(model, folder, ["-P", "-m", "layercut.export.reload_offloaded_process"])


@torch.no_grad()
def _verified(model: Any, folder: Path, checker: list[str], text: torch.Tensor | None = None) -> dict[str, Any]:
    """What the checker prints, which is given a few tokens, the model's logits and perhaps text. ReloadError where it
    fails."""
    parameter = next(model.parameters())
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, (2, 32), generator=torch.Generator().manual_seed(0))
    logits = model(input_ids=tokens.to(parameter.device), use_cache=False).logits
    expected = {"tokens": tokens, "logits": logits.cpu().contiguous()}
    if text is not None:
        expected["text"] = text.contiguous()
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "expected.safetensors"
        with writing(file):
            save_file(expected, file)
        command = [sys.executable, *checker, str(folder), str(file)]
        command += [str(parameter.device), str(parameter.dtype).removeprefix("torch."), str(torch.get_num_threads())]
        return _checked(command, Path(scratch) / "stderr")


def _checked(command: list[str], errors: Path) -> dict[str, Any]:
    """Run a checker, showing which of its steps it is at, and read what it found off its last line."""
    last = ""
    with (
        bar("verifying in a fresh process", None) as advance,
        errors.open("w") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=_environment()) as process,
    ):
        assert process.stdout
        for line in process.stdout:
            last = line.strip()
            if last.startswith(STEP):
                advance(1, last.removeprefix(STEP))
    if process.returncode != 0:
        lines = errors.read_text(errors="replace").strip().splitlines() or ["no message"]
        raise ReloadError(f"the saved model does not reload as it was: {lines[-1]}")
    return json.loads(last)


def _environment() -> dict[str, str]:
    """For a fresh process with -P: it finds the packages that this one finds, wherever they lie, but none in the folder
    where the user happens to be. Of layercut's own path it needs nothing, and `export/reload_process.py` bars that
    import."""
    here = os.getcwd()
    paths = [os.path.abspath(path) for path in sys.path if path and os.path.abspath(path) != here]
    no_more = {"PYTHONNOUSERSITE": "1"} if sys.flags.no_user_site else {}
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | no_more


def text_to_check(blocks: torch.Tensor, window: int = CHECK_WINDOW) -> torch.Tensor:
    """The first tokens of blocks [N, T], as many as what was exported is measured on again, in rows of no more than
    `window`."""
    rows = in_rows(blocks, window)
    return rows[: max(1, CHECK_TOKENS // rows.shape[1])].contiguous()
