"""Checks with transformers and llama.cpp that a GGUF file is the model that it should be, before it takes its name.

What llama.cpp will take the layers for is compared with what the folder's config says (`unlike_the_folder`), and every
weight as transformers reads it. Where llama-cpp-py-sync is installed, llama.cpp loads the file in a fresh process
(`export/llama_cpp_process.py`), and what it computes from text longer than the sliding window has to be what the
source computes.
"""

from __future__ import annotations

import copy
import io
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layercut.errors import LayercutError, ModelError, first_line
from layercut.export.gguf_tensors import tensor_types
from layercut.models import llama_cpp_rules as rules
from layercut.models.checkpoints import Checkpoint
from layercut.models.decoder_stack import as_stored, positions
from layercut.models.gguf_header import quick_gguf, read_header
from layercut.models.loading import check_loading, load_config, quiet_transformers

LARGEST_ERROR = {"f32": 1e-4, "f16": 1e-3, "bf16": 5e-3, "q8_0": 1.5e-2}
"""Relative error (Frobenius norm) of a weight that was written and read back. Rounding alone stays below a half of
these; a weight under the wrong name, or with its rows in the wrong order, is off by about 1.4."""
LARGEST_ERROR_OF_BITS = ((4.0, 0.25), (3.0, 0.4), (0.0, 0.75))
"""The same of the other types, by bits a weight: Gaussian weights in Q4_K are 0.07 off, in Q3_K 0.15, in IQ1_S 0.53."""
LARGEST_LOGIT_ERROR = {"f32": 0.01, "f16": 0.02, "bf16": 0.03}
ROUNDED_PRODUCTS = 0.12
"""Relative error of llama.cpp's logits against transformers on the same weights, by the file's type. Beside quantized
weights llama.cpp rounds what goes into its products to 8 bits, which costs a few hundredths; float32 was 2e-6 to 5e-4
off in tiny models of eight architectures. A window of layers in the wrong place is 0.26 and more."""
BEYOND = 64  # tokens past the sliding window that are compared, and as many before its end
CHECKER = Path(__file__).with_name("llama_cpp_process.py")
_TAKE_FOLDER = "use the checkpoint folder instead, and convert it with llama.cpp's own tools"


def readable(architecture: str) -> bool:
    """Whether transformers reads this architecture from GGUF."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    return architecture in GGUF_SUPPORTED_ARCHITECTURES


def unlike_the_folder(file: Path, config: Any) -> list[bool] | None:
    """Compare what llama.cpp makes of a converted file's layers with the config of the folder it was made from."""
    header, config = read_header(file), config.get_text_config(decoder=True)
    name, layers, facts = header.architecture, header.layers, header.facts()
    # what llama.cpp does at some numbers of layers only has to be what the config asks for
    if wanted := getattr(config, "query_pre_attn_scalar", None):
        heads = config.num_attention_heads
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
        scale = rules.attention_scale(name, config.hidden_size, heads, head, layers)
        if scale and abs(scale / wanted - 1) > 1e-6:
            raise ModelError(
                f"llama.cpp divides the attention of {name} with {layers} layers by the root of {scale:g}, "
                f"the model by that of {wanted:g}",
                _TAKE_FOLDER,
            )
    if name == "command-r" and bool(getattr(config, "use_qk_norm", False)) != (layers >= 64):
        words = f"llama.cpp normalizes queries and keys of {name} from 64 layers on, and this model has {layers}"
        raise ModelError(words, _TAKE_FOLDER)
    # which layers attend to everything, or have no rotary positions where that is what distinguishes them
    full: list[bool] | None = None
    types, rope = getattr(config, "layer_types", None), getattr(config, "no_rope_layers", None)
    if types and len({*types}) > 1:
        full = [each in ("full_attention", "attention") for each in types]
    elif rope and len({*map(bool, rope)}) > 1:
        full = [not each for each in rope]  # 1: with rotary positions
    elif types or rope:
        full = [not types or types[0] in ("full_attention", "attention")] * layers
    theirs = rules.full_layers(name, facts, layers)
    if len({*(full or ())}) < 2 and theirs is None:
        return None
    if full == theirs:
        return None
    if full is None or len(full) != layers:
        got = f"the folder's config lists {len(full or ())} layers, the file has {layers}"
        raise ModelError(f"{file.name}: {got}", _TAKE_FOLDER)
    rule = rules.PERIODS.get(name)
    if rule and rule.array and not isinstance(facts.get(rules.PATTERN), list):
        return full
    odd = next((i for i, each in enumerate(full) if theirs is None or theirs[i] != each), 0)
    why = f"every {rules.ordinal(rule.every)} layer of {name}" if rule else f"no layer of {name}"
    if rules.COUNTED.get(name) and theirs is None:
        why = f"no layer of {name} with {layers} layers"
    words = f"llama.cpp treats {why} differently, the model does not (layer {odd} first), and no key says so"
    raise ModelError(words, "cut so that the kept layers stay in step with that, or take another engine")


def read_by_transformers(file: Path, config: Any = None) -> Any:
    """The model in a GGUF file, in float32."""
    from transformers import AutoModelForCausalLM

    source = Checkpoint(str(file), file.parent, file.name)
    config = copy.deepcopy(config or load_config(source))
    config.dtype = torch.float32
    with quiet_transformers(), redirect_stderr(io.StringIO()), quick_gguf():
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                source.folder,
                config=config,
                gguf_file=source.gguf_path,
                dtype=torch.float32,
                output_loading_info=True,
                use_kernels=False,
            )
        except LayercutError:
            raise
        except Exception as error:
            raise ModelError(f"{file.name} cannot be read back: {first_line(error)}", _TAKE_FOLDER) from error
    check_loading(info, file.name)
    return model.requires_grad_(False).eval()


def weights_in(file: Path, model: Any, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Parameters as they are in a GGUF file."""
    read = dict(read_by_transformers(file, model.config).named_parameters()) if names else {}
    return {name: read[name].to(model.get_parameter(name).dtype) for name in names}


@torch.no_grad()
def compare_weights(name: str, read: Any, model: Any, rounded: Mapping[str, str]) -> dict[str, float]:
    """Compare every weight of a file with the model's, in the dtype that the model is saved in."""
    found = dict(read.named_parameters())
    wanted = dict(as_stored(model).named_parameters())
    if missing := wanted.keys() ^ found.keys():
        raise ModelError(f"{name}, read back, differs in {min(missing)}", _TAKE_FOLDER)
    errors = {}
    for parameter, weight in wanted.items():
        other = found[parameter]
        if parameter not in rounded:
            if not torch.equal(weight.cpu(), other.to(weight.dtype)):
                raise ModelError(f"{name}, read back, holds another {parameter}", _TAKE_FOLDER)
            continue
        kind = rounded[parameter]
        wanted_norm = weight.cpu().float().norm().clamp(min=1e-30)
        errors[parameter] = ((other.float() - weight.cpu().float()).norm() / wanted_norm).item()
        if not errors[parameter] <= largest_error(kind):
            raise ModelError(
                f"{name}, read back, is off by {errors[parameter]:.3g} in {parameter} ({kind}): "
                "layercut does not know how llama.cpp lays this architecture out",
                _TAKE_FOLDER,
            )
    return errors


def largest_error(kind: str) -> float:
    """The relative error that rounding to a GGML type, in lower case, may make of a weight."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if kind in LARGEST_ERROR:
        return LARGEST_ERROR[kind]
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind.upper()]]
    return next(error for least, error in LARGEST_ERROR_OF_BITS if 8 * size / block >= least)


@torch.no_grad()
def by_llama_cpp(
    file: Path, reference: Any, tokenizer: Any, tokens: torch.Tensor, *, judge: bool = True
) -> dict[str, Any]:
    """What llama.cpp computes from the file in a fresh process, compared with a reference."""
    text = tokenizer.decode(tokens[0], skip_special_tokens=True)
    # past the sliding window, and repeated where the text is too short
    row, config = tokens.flatten(), reference.config.get_text_config(decoder=True)
    slides = any(each not in ("full_attention", "attention") for each in getattr(config, "layer_types", None) or [])
    window = int(getattr(config, "sliding_window", None) or 0) if slides else 0
    length = window + BEYOND if window else tokens.shape[1]
    length = min(length, positions(reference.config) or length)
    long = row.repeat(-(-length // row.numel()))[:length]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        np.save(scratch / "tokens.npy", tokens.numpy())
        np.save(scratch / "long.npy", long.numpy())
        (scratch / "text.txt").write_text(text, encoding="utf-8")
        found = _printed(file, scratch, str(min(2 * BEYOND, len(long))))
        theirs, beyond = (torch.from_numpy(np.load(scratch / f"{name}.npy")) for name in ("logits", "long_logits"))
    ours = _logits(reference, tokens[:1])
    error = max(_off(theirs, ours), _off(beyond, _logits(reference, long[None], last=len(beyond))))
    written = torch.tensor([found.pop("written")])
    likeliest = _logits(reference, written)[found["prompt"] - 1 : -1].argmax(-1)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    found["perplexity"] = math.exp(min(found.pop("loss"), 700.0))
    found |= {
        "logit_error": error,
        "positions": len(long),
        "same_top": (theirs.argmax(-1) == ours.argmax(-1)).float().mean().item(),
        "greedy": int((likeliest == written[0, found["prompt"] :]).sum()),
        "same_token_ids": found.pop("ids") == ids,
    }
    kinds = [kind.lower() for kind in tensor_types(file)]
    if judge and not error <= max(LARGEST_LOGIT_ERROR.get(kind, ROUNDED_PRODUCTS) for kind in kinds):
        words = f"llama.cpp computes something else from {file.name}: its logits are off by {error:.3g}"
        raise ModelError(words, _TAKE_FOLDER)
    return found


def perplexity_by_llama_cpp(file: Path, tokens: torch.Tensor) -> float:
    """Perplexity of a GGUF file in llama.cpp, in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "tokens.npy", tokens.numpy())
        return math.exp(min(_printed(file, Path(folder))["loss"], 700.0))


def speed_by_llama_cpp(dense: Path, pruned: Path) -> dict[str, Any]:
    """Tokens a second that llama.cpp decodes from both files: {"dense", "compressed", "ratio", "threads"}."""
    return _told([str(CHECKER), "speed", str(torch.get_num_threads()), str(dense), str(pruned)], pruned)


def _printed(file: Path, scratch: Path, *more: str) -> dict[str, Any]:
    """What `export/llama_cpp_process.py` prints. ModelError: it fails."""
    return _told([str(CHECKER), str(file), str(scratch), str(torch.get_num_threads()), *more], file)


def _told(arguments: list[str], file: Path) -> dict[str, Any]:
    """The last line that a fresh process prints, as JSON. ModelError: it fails."""
    done = subprocess.run([sys.executable, "-P", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise ModelError(f"llama.cpp cannot use {file.name}: {lines[-1]}", _TAKE_FOLDER)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The median over positions [T] of the relative error of logits [T, V], each position's mean taken out.

    Of the two halves of the positions the larger, since a sliding window shows only past its end.
    """
    found, wanted = (z - z.mean(-1, keepdim=True) for z in (found, wanted))
    errors = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1e-30)
    half = len(errors) // 2
    return max(part.median().item() for part in (errors[:half], errors[half:]) if len(part))


def _logits(model: Any, tokens: torch.Tensor, last: int = 0) -> torch.Tensor:
    """Logits of a row of tokens: [1, T] -> [last or T, V]."""
    device = next(model.parameters()).device
    return model(input_ids=tokens.to(device), use_cache=False, logits_to_keep=last).logits[0].float().cpu()
