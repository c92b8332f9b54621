"""A model as a stock Hugging Face folder, verified by a fresh process that cannot import layercut.

`save` is for a model of the caller's, `export_checkpoint` what it and the command's export stage do. A quantized model
comes as a plain model whose weights are the rounded ones, and the packed tensors that stand for them; saved are the
packed ones, and a reload must compute the same logits to the bit.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from layercut.data.blocks import in_rows
from layercut.errors import ModelError, RunError
from layercut.files import check_replaceable, partial_of, read_json, replace_folder, size, usual_mode_, writing
from layercut.models import checkpoints, layer_reader, memory
from layercut.models.config_files import add_older_names_
from layercut.models.decoder_stack import as_stored, share
from layercut.models.loading import quiet_transformers
from layercut.models.placement import device_map_of, placed_over
from layercut.models.runner import DecoderRunner
from layercut.progress import bar, say
from layercut.quantization import Quantized
from layercut.surgery.checkpoint_cut import BESIDE, companions

CHECKER = Path(__file__).with_name("reload_process.py")
STEP = "step: "  # how a line of a checker begins that says what it does next
CHECK_TOKENS, CHECK_WINDOW = 2048, 256  # tokens of text, at most, that what was exported is measured on again


class ReloadError(Exception):
    """The saved model is not the model in memory: a fault of layercut or transformers, not of the input."""


@dataclass(frozen=True)
class Exported:
    """A checkpoint that was written."""

    folder: Path
    bytes: int
    """Of the weight files."""
    check: Mapping[str, Any] | None
    """What the fresh process found: "logits", "cached_generation", the "tokens" it generated, and "perplexity" on
    `text`; None: not verified."""

    def to_dict(self) -> dict[str, Any]:
        return {"folder": str(self.folder), "bytes": self.bytes, "check": dict(self.check) if self.check else None}


def save(
    model: Any,
    tokenizer: Any,
    folder: str | Path,
    *,
    verify: bool = True,
    text: torch.Tensor | None = None,
    overwrite: bool = False,
    source: Path | None = None,
) -> Exported:
    """Save a model as a stock checkpoint folder; `model` stays as it is.

    The folder appears whole or not at all: only after a fresh process, with stock transformers and without layercut,
    has loaded it, computed the same logits to the bit and generated with the cache what is computed without it.

    Args:
        model: a causal LM of transformers in memory, a DecoderRunner of one, or what `layercut.quantize` returned.
        tokenizer: a tokenizer of transformers.
        folder: where to write.
        verify: whether to start that process.
        text: token ids [N, T] on which it measures perplexity.
        overwrite: replace what is in the folder.
        source: the checkpoint folder that the model came from, whose processor's files and licences come too.

    Raises:
        RunError: the folder is there and not empty, is or holds a run, or cannot be written.
        ModelError: no model of transformers, such as one in an adapter's wrapper.
        ReloadError: what was saved is not what is in memory, which is a fault of layercut or transformers.

    Returns:
        The folder, its size, and what the fresh process found.
    """
    from transformers import PreTrainedModel

    folder = Path(os.path.abspath(folder))
    if folder.is_file() or (not overwrite and folder.is_dir() and any(folder.iterdir())):
        raise RunError(f"{folder} exists already", "name another folder, or replace this one: overwrite=True")
    check_replaceable(folder, source)
    packing: dict[str, Any] = {}
    if isinstance(model, Quantized):
        packing = {"packed": dict(model.packed), "quantization_config": dict(model.config)}
    given = model.at_rest if isinstance(model, DecoderRunner) else model.model if packing else model
    if not isinstance(given, PreTrainedModel):  # which `save_pretrained` would not write as a checkpoint of its own
        words = f"a {type(given).__name__} is no model of transformers that could be saved as a stock checkpoint"
        raise ModelError(words, "take adapters and wrappers off first; of peft: model = model.merge_and_unload()")
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    clone = share(given).eval()
    found = export_checkpoint(clone, tokenizer, folder, text=text, check=verify, source=source, **packing)
    return Exported(folder, found["bytes"], found["check"])


def export_checkpoint(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    packed: dict[str, torch.Tensor] | None = None,
    quantization_config: dict[str, Any] | None = None,
    text: torch.Tensor | None = None,
    check: bool = True,
    source: Path | None = None,
) -> dict[str, Any]:
    """Save model, tokenizer and generation config; verify; only then put the folder in its place.

    packed: tensors in the place of the weights that they encode, which `quantization_config` says how to read.
    """
    model = as_stored(model)
    state = model.state_dict()
    if packed:
        replaced = {key if key in state else f"{key.rpartition('.')[0]}.weight" for key in packed}
        stood_for = {state[name].data_ptr() for name in replaced}  # a tied head too, by whatever name
        state = {name: tensor for name, tensor in state.items() if tensor.data_ptr() not in stood_for} | packed
    partial = partial_of(folder)
    shutil.rmtree(partial, ignore_errors=True)

    def written() -> float:
        return sum(file.stat().st_size for file in partial.glob("*.safetensors") if file.exists())

    try:
        with writing(folder), quiet_transformers(), bar("saving", distinct_bytes(state), written):
            if quantization_config is not None:  # the config says how the weights are packed; the model is a plain one
                model.config.quantization_config = quantization_config
            try:
                # a copy: for some architectures transformers empties the dict that it is given
                model.save_pretrained(partial, state_dict=dict(state) if packed else None)
            finally:
                if quantization_config is not None:
                    del model.config.quantization_config
            tokenizer.save_pretrained(partial)
            if source is not None:
                copy_beside(source, partial)
            add_older_names_(partial)
        usual_mode_(partial)
        check_bytes(partial, state)
        found = None
        if check:
            found = verify_reload(model, partial, text) if packed else verify(model, partial, text)
        return _put_in_place(partial, folder, found)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def publish_streamed(model: Any, partial: Path, folder: Path) -> dict[str, Any]:
    """Verify a checkpoint that was written from files, then put the folder in its place."""
    try:
        return _put_in_place(partial, folder, verify_streamed(model, partial))
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _put_in_place(partial: Path, folder: Path, check: dict[str, Any] | None) -> dict[str, Any]:
    with writing(folder):
        replace_folder(partial, folder)
    return {"bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")), "check": check}


def copy_beside(source: Path, folder: Path) -> None:
    """Copy what belongs to a model and is neither weights nor tokenizer, as far as it is not there."""
    there = {file.name for file in folder.iterdir()}
    there |= {"chat_template.json"} if "chat_template.jinja" in there else set()  # an older name of the same
    try:
        for path in companions(source, BESIDE)[0]:
            if path.name not in there:
                shutil.copyfile(source / path, folder / path.name)
    except ModelError as error:  # a link out of the checkpoint
        say("export", f"not copied: {error.message}")


def check_bytes(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Refuse files that hold more bytes than the tensors do."""
    expected, saved = distinct_bytes(state), 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = 8 + int.from_bytes(stream.read(8), "little")
        saved += file.stat().st_size - header
    if saved > expected:
        raise ReloadError(
            f"{saved:,} bytes of weights were saved, but the model has {expected:,}: a tied weight was saved twice"
        )


def distinct_bytes(state: dict[str, torch.Tensor]) -> int:
    """Bytes of all tensors, one that has two names counted once."""
    return sum({(t.data_ptr(), t.nbytes): t.nbytes for t in state.values()}.values())


def verify(model: Any, folder: Path, text: torch.Tensor | None = None) -> dict[str, Any]:
    """`verify_reload`; where its process would not fit into memory beside this one, `verify_streamed`."""
    parameter, checkpoint = next(model.parameters()), checkpoints.resolve(str(folder))
    # what a fresh process holds: the weights as they are saved, and turned into float32
    needed = sum(p.numel() for p in model.parameters()) * (parameter.itemsize + torch.float32.itemsize)
    free = sum(map(memory.available_bytes, placed_over(model) or [parameter.device]))
    if needed <= free or layer_reader.why_not_by_layer(checkpoint, model.config):
        return verify_reload(model, folder, text)
    lacking = f"the {size(needed)} to load it whole were not free: layers left on disk, nothing generated"
    return verify_streamed(model, folder) | {"how": lacking}


def verify_reload(model: Any, folder: Path, text: torch.Tensor | None = None) -> dict[str, Any]:
    """Load the folder in a new process with stock transformers and compare with the model in memory.

    Logits must be equal to the bit in the dtype that is saved; greedy generation with the cache must give the tokens
    that forward passes without it give (in float32, where rounding makes no ties), at the model's own positions or from
    0 on. Of `text` the process measures the perplexity, in float32 as well: some CPUs take many times as long over
    narrower dtypes.
    """
    return _verified(model, folder, ["-P", str(CHECKER)], text)


def verify_streamed(model: Any, folder: Path) -> dict[str, Any]:
    """Open the folder in a new process with its layers left on disk and compare with the model.

    Logits must be equal to the bit. transformers' loader places each layer's weights, but they are never whole in
    the new process's memory, and nothing is generated.
    """
    code = "import sys; from layercut.export.checkpoint import compare_streamed; compare_streamed(*sys.argv[1:])"
    return _verified(model, folder, ["-P", "-c", code])


@torch.no_grad()
def compare_streamed(folder: str, expected: str, device: str, dtype: str, threads: str) -> None:
    """The fresh process of `verify_streamed`: print its steps and what it found, or exit with the difference."""
    torch.set_num_threads(int(threads))
    reference = load_file(expected)
    print(f"{STEP}opening", flush=True)
    model = layer_reader.open_on_disk(checkpoints.resolve(folder), dtype=dtype, device=device).model
    print(f"{STEP}comparing logits", flush=True)
    got = model(input_ids=reference["tokens"].to(device), use_cache=False).logits.cpu()
    if not torch.equal(got, reference["logits"]):
        sys.exit(f"logits differ by up to {(got.float() - reference['logits'].float()).abs().max().item():g}")
    how = "with layers left on disk; not loaded whole, nothing generated"
    print(json.dumps({"logits": "equal to the bit", "cached_generation": None, "tokens": None, "how": how}))


@torch.no_grad()
def _verified(model: Any, folder: Path, checker: list[str], text: torch.Tensor | None = None) -> dict[str, Any]:
    """What a checker prints on its last line, given a few tokens, the model's logits and perhaps text."""
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
        # compressed-tensors takes off the hooks of a model on several devices (0.20): one device holds a packed one
        several = len(placed_over(model)) > 1 and "quantization_config" not in read_json(folder / "config.json")
        place = json.dumps(device_map_of(model)) if several else str(parameter.device)
        command += [place, str(parameter.dtype).removeprefix("torch."), str(torch.get_num_threads())]
        # another attention than transformers would choose sums in another order, which is not equal to the bit
        attention = getattr(model.config, "_attn_implementation", None)
        command += [attention] if "-c" not in checker and attention not in (None, "sdpa") else []
        last, errors = "", Path(scratch) / "stderr"
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
    """Of a fresh process with -P, which finds the packages that this one finds, but none in the current folder."""
    here = os.getcwd()
    paths = [os.path.abspath(path) for path in sys.path if path and os.path.abspath(path) != here]
    no_more = {"PYTHONNOUSERSITE": "1"} if sys.flags.no_user_site else {}
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | no_more


def text_to_check(blocks: torch.Tensor, window: int = CHECK_WINDOW) -> torch.Tensor:
    """The first tokens of blocks, as many as what was exported is measured on again."""
    rows = in_rows(blocks, window)
    return rows[: max(1, CHECK_TOKENS // rows.shape[1])].contiguous()
