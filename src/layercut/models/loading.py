"""From the files of a checkpoint (`models/checkpoints.py`) to a causal language model and its tokenizer.

Nothing a checkpoint contains is executed: remote code and pickled weights are refused unless asked for.
"""

from __future__ import annotations

import copy
import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from layercut.config import no_device
from layercut.distributed import processes
from layercut.errors import ModelError, first_line
from layercut.files import LARGEST_JSON, REFETCH, open_regular, read_json
from layercut.models import checkpoints, config_files, gguf_header
from layercut.models.checkpoints import Checkpoint
from layercut.models.decoder_stack import convert_parameters_
from layercut.models.gguf_header import HEAD, corrupt, quick_gguf, read_header
from layercut.progress import say

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INSTRUCTIONS = {torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"), torch.float16: ()}
"""What a CPU must have to multiply matrices of a dtype as fast as of float32, by torch's names; any of them."""
SLACK = 2**26
"""Numbers that a model may have beyond twice those stored: tables that classes compute, such as attention masks."""
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model",
)  # fmt: skip
COPY_TOKENIZER = "copy tokenizer.json and tokenizer_config.json of the original model into the folder"
SAMPLE = "The quick brown fox jumps over 13 lazy dogs.\n"


@dataclass
class LanguageModel:
    """A loaded model with its tokenizer and where it came from."""

    model: Any
    tokenizer: Any
    checkpoint: Checkpoint
    dtype: torch.dtype  # the dtype it is computed in; `stored_dtype(model)` is the one it is saved in
    device: torch.device


# --- where, and in which number format --------------------------------------------------------------------------


def pick_device(device: str) -> torch.device:
    """The device of a name; "auto" takes the first accelerator that torch sees, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    try:
        place = (accelerator or torch.device("cpu")) if device == "auto" else torch.device(device)
    except RuntimeError:
        raise no_device(device) from None
    if place.type != "cpu" and (accelerator is None or place.type != accelerator.type):
        raise ModelError(f"device {device!r} is not available on this machine", "use --device cpu, or --device auto")
    if place.type != "cpu" and (place.index or 0) >= torch.accelerator.device_count():
        words = f"device {device!r} is not there: this machine has {torch.accelerator.device_count()}"
        raise ModelError(words, f"use --device {place.type}:0")
    processes.check_device(place)
    return place


def accelerators(kind: torch.device) -> list[torch.device]:
    """The accelerators of this machine that a model may be placed over; one where the user named it, none on a CPU."""
    if kind.type == "cpu":
        return []
    named = kind.index is not None
    return [kind] if named else [torch.device(kind.type, i) for i in range(torch.accelerator.device_count())]


def pick_dtype(dtype: str, config: Any, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that the weights are saved in: the checkpoint's own for "auto", bfloat16 where that is GGUF."""
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ModelError(f"--dtype {dtype!r} is unknown", f"allowed are auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    if checkpoint.gguf:
        return torch.bfloat16
    own, text = (getattr(c, "dtype", None) for c in (config, config.get_text_config()))
    stored = own or text or torch.float32
    return getattr(torch, stored) if isinstance(stored, str) else stored


def computing_dtype(dtype: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to compute in: `stored`, or float32 where "auto" is asked of a CPU that cannot multiply it.

    Such a CPU takes nine times as long over bfloat16 as over float32 (AVX2).
    """
    if dtype != "auto" or device.type != "cpu" or stored not in INSTRUCTIONS:
        return stored
    return stored if any(cpu_has(feature) for feature in INSTRUCTIONS[stored]) else torch.float32


def cpu_has(feature: str) -> bool:
    """Whether this CPU has some instructions, by torch's names; none where torch cannot say."""
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(known.get(feature))


# --- the config -----------------------------------------------------------------------------------------------


def load_config(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    if not checkpoint.gguf:
        checkpoints.check_config(checkpoint.folder)
        raw = read_json(checkpoint.folder / "config.json")
        if not trust_remote_code and "auto_map" in raw and raw.get("model_type") not in CONFIG_MAPPING:
            words = f"{checkpoint.folder.name} brings its own modelling code, which layercut does not run"
            raise ModelError(words, "pass --trust-remote-code if you have read that code and trust it")
    hint = "check that this version of transformers knows the architecture: pip install -U transformers"
    with _said(f"the config of {checkpoint.name} cannot be read", hint):
        if checkpoint.gguf:
            config = gguf_header.read_config(checkpoint.file)
        else:
            config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
    _check_causal(config, checkpoint.name, trust_remote_code)
    return config


@contextmanager
def _said(what: str, hint: str) -> Iterator[None]:
    """While open, whatever a library raises is said in our words: classes fail with any kind of error."""
    try:
        yield
    except ModelError:
        raise
    except ImportError as error:
        if "flash" in str(error).lower():
            words = f"the config asks for an attention implementation that is missing here: {first_line(error)}"
            raise ModelError(words, "take attn_implementation out of config.json: transformers then chooses") from None
        extra = "quantize" if "compressed" in str(error) else "gguf"
        words = f"reading this model needs a package that is missing: {first_line(error)}"
        raise ModelError(words, f'pip install "layercut[{extra}]"') from None
    except Exception as error:
        raise ModelError(f"{what}: {first_line(error)}", hint) from error


def _check_causal(config: Any, name: str, trust_remote_code: bool) -> None:
    """Accept only decoder-only language models, and vision-language models whose text part is one."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    why, hint = "", "give a causal language model such as Llama, Qwen or Gemma"
    classes = set()
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        found = mapping.get(type(config), ())
        classes |= {cls.__name__ for cls in (found if isinstance(found, tuple) else (found,))}
    remote = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    heads = getattr(config, "architectures", None) or []
    usual = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    if getattr(config, "is_encoder_decoder", False):
        why = f"is an encoder-decoder model ({config.model_type}); layercut cuts decoder-only models"
    elif not (classes or remote):
        why = f"is not a causal language model (model type {config.model_type!r})"
    elif heads and not any(h.endswith(usual) or h in classes for h in heads):
        why = f"is a checkpoint of {', '.join(heads)}, which is not a causal language model"
        hint = "give the checkpoint with the language-modelling head"
    if why:
        raise ModelError(f"{name} {why}", hint)


def auto_class(config: Any, *, trust_remote_code: bool = False) -> Any:
    """transformers' automatic class for a config: of language models, or of vision-language models."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    # transformers names remote code in its own mapping only; a known config takes its stock class
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or trust_remote_code:
        return AutoModelForCausalLM
    return AutoModelForImageTextToText


def build(config: Any, dtype: torch.dtype) -> Any:
    """The stock class of a config with initial weights, in eval mode, on torch's default device."""
    hint = "check config.json, and that this version of transformers knows the architecture"
    with quiet_transformers(), _said("no model can be built from this config", hint):
        return auto_class(config).from_config(config, dtype=dtype).eval().requires_grad_(False)


def skeleton(config: Any, dtype: torch.dtype) -> Any:
    with torch.device("meta"):
        return build(config, dtype)


# --- the weights ----------------------------------------------------------------------------------------------


def load(
    checkpoint: Checkpoint,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    tokenizer: Any = None,
    moved: bool = True,
) -> LanguageModel:
    """Load weights, and the tokenizer where it is not given; every weight has to be there, in its shape.

    moved: False leaves the weights in the machine's memory, as the device will compute them.
    """
    config = load_config(checkpoint, trust_remote_code=trust_remote_code)
    place = pick_device(device)
    stored = pick_dtype(dtype, config, checkpoint)
    number = computing_dtype(dtype, stored, place)
    quantized = getattr(config, "quantization_config", None) is not None
    refuse_larger(config, checkpoint, trust_remote_code=trust_remote_code)
    how: dict[str, Any] = {"trust_remote_code": trust_remote_code, "use_safetensors": None if allow_pickle else True}
    finer = None
    if checkpoint.gguf:
        from transformers import GgufConfig

        how = {"gguf_file": checkpoint.gguf_path, "quantization_config": GgufConfig(dequantize=True)}
        if finer := read_header(checkpoint.file).finer_twin:
            config.tie_word_embeddings = False  # until both are read
    # packed weights are unpacked in the dtype they are stored in: a loader's own arithmetic
    as_read = stored if checkpoint.gguf or quantized else number
    hint = "check that the checkpoint is complete and that this version of transformers knows it"
    bars = redirect_stderr(io.StringIO()) if checkpoint.gguf or quantized else nullcontext()
    with quiet_transformers(), _said(f"{checkpoint.name} cannot be loaded", hint):
        with bars, quick_gguf() if checkpoint.gguf else nullcontext():  # bars do not ask whether they are wanted
            model, info = auto_class(config, trust_remote_code=trust_remote_code).from_pretrained(
                checkpoint.folder,
                config=config,
                dtype=as_read,
                ignore_mismatched_sizes=True,  # refused by name
                output_loading_info=True,
                use_kernels=False,  # by default since transformers 5.25: code from the Hub, other numbers
                **how,
            )
        check_loading(info, checkpoint.name)
        _unquantize_(model, checkpoint)
        if finer:
            embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
            embedding.weight = head.weight = (head if finer == HEAD else embedding).weight
            model.config.tie_word_embeddings = True
            model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
            _say_once(f"{checkpoint.name} keeps its tied embeddings twice: read once, from {finer}, the finer rounding")
        if checkpoint.gguf:
            convert_parameters_(model, stored)
        if number != stored:
            convert_parameters_(model, number)
    tokenizer = tokenizer or load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
    model = (model.to(place) if moved else model).eval().requires_grad_(False)
    model.stored_dtype = stored
    return LanguageModel(model, tokenizer, checkpoint, number, place)


@lru_cache
def _say_once(words: str) -> None:
    """In a run a model is loaded more than once."""
    say("note", words)


def _unquantize_(model: Any, checkpoint: Checkpoint) -> None:
    """Make a plain model of one of packed weights, by compressed-tensors or in GGUF, and take off transformers' marks.

    With these it would refuse to save, and unpack half of compressed-tensors in the first forward.
    """
    compressor = getattr(getattr(model, "hf_quantizer", None), "compressor", None)
    if compressor is not None:
        from compressed_tensors.compressors.base import decompress_module

        compressor.remove_decompression_hook(model)
        for module in model.modules():
            decompress_module(module, leave_decompressed=False)
    elif not checkpoint.gguf:
        return
    model.hf_quantizer = None
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    for name in ("quantization_method", "is_quantized"):
        model.__dict__.pop(name, None)
    if checkpoint.gguf:
        model.config.architectures = [type(model).__name__]
        model.config._name_or_path = checkpoint.name
    else:
        model.tie_weights()


def refuse_larger(config: Any, checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> None:
    """Refuse a config that calls for far more numbers than the files hold, before memory is taken for them.

    transformers fills what is missing or of another shape with random numbers, however many, and reports it afterwards
    (`check_loading`). Quantized and pickled weights are not counted.
    """
    if checkpoint.gguf:
        stored, slack = read_header(checkpoint.file).elements, 0
        numbers = [value for value in config.to_dict().values() if isinstance(value, int)]
        if any(abs(value) > max(1 << 31, stored) for value in numbers):
            raise corrupt(checkpoint.file, "a size in its metadata is larger than the file")
    elif getattr(config, "quantization_config", None) is not None or not checkpoints.weight_files(checkpoint.folder):
        return
    else:
        stored, slack = checkpoints.stored_elements(checkpoint.folder), SLACK
    with quiet_transformers(), torch.device("meta"):
        try:
            model = auto_class(config, trust_remote_code=trust_remote_code).from_config(
                copy.deepcopy(config), trust_remote_code=trust_remote_code
            )
        except Exception:  # loading builds the class likewise, and says what is wrong
            return
    tensors = model.parameters() if checkpoint.gguf else (*model.parameters(), *model.buffers())
    wanted = sum(tensor.numel() for tensor in tensors)
    if wanted > 2 * stored + slack:
        words = f"the config of {checkpoint.name} calls for {wanted:,} weights, and its files hold {stored:,}"
        raise ModelError(words, "give the config.json that belongs to these weights, or fetch the file again")


def check_loading(info: dict[str, Any], name: str) -> None:
    """Refuse missing or mismatched weights, which transformers fills with random numbers and only warns of."""
    if missing := sorted(info.get("missing_keys") or []):
        words = f"{name} lacks {len(missing)} weights that its config calls for (first: {missing[0]})"
        raise ModelError(words, "the checkpoint is incomplete, or num_hidden_layers in its config.json does not fit it")
    if mismatched := sorted(info.get("mismatched_keys") or []):
        weight, stored, wanted = mismatched[0]
        raise ModelError(
            f"{name} holds {len(mismatched)} weights of another shape than its config calls for "
            f"(first: {weight} is {list(stored)}, called for is {list(wanted)})",
            "give the config.json that belongs to these weights",
        )


# --- the tokenizer --------------------------------------------------------------------------------------------


def load_tokenizer(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint, tested on a line of text; of a GGUF file its own, where that can be read."""
    if not checkpoint.gguf:
        folder = checkpoint.folder
        there = [folder / name for name in TOKENIZER_FILES if (folder / name).exists()]
        if not any(file.is_file() for file in there):
            raise ModelError(f"{folder} holds no tokenizer", COPY_TOKENIZER)
        for file in there:
            with open_regular(file) as opened:
                size = os.fstat(opened.fileno()).st_size
            if size > LARGEST_JSON:
                raise ModelError(f"{file} has {size:,} bytes; allowed are {LARGEST_JSON:,}", REFETCH)
        if (file := folder / "tokenizer_config.json") in there:
            config_files.check_tokenizer_config(read_json(file), str(file))
        return _tokenizer_in(folder, checkpoint, trust_remote_code)
    with tempfile.TemporaryDirectory() as alone:  # transformers prefers a tokenizer.json beside it, of whatever model
        (Path(alone) / checkpoint.file.name).symlink_to(checkpoint.file.absolute())
        try:
            own = _tokenizer_in(Path(alone), checkpoint, trust_remote_code)
        except ModelError:
            beside = _tokenizer_in(checkpoint.folder, checkpoint, trust_remote_code)
            say("note", f"the tokenizer of {checkpoint.name} cannot be read: the one beside it is taken")
            return beside
    own.name_or_path = str(checkpoint.folder)
    return own


def _tokenizer_in(folder: Path, checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        with quiet_transformers(), quick_gguf() if checkpoint.gguf else nullcontext():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, gguf_file=checkpoint.gguf, trust_remote_code=trust_remote_code
            )
            tokenizer(SAMPLE)
        return tokenizer
    except BaseException as error:
        # the library in Rust ends in a kind of its own that is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        words = f"the tokenizer of {checkpoint.name} cannot be loaded: {first_line(error)}"
        raise ModelError(words, COPY_TOKENIZER) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' own progress bars and advice while a stage shows its own."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    advice = os.environ.get("TRANSFORMERS_VERBOSITY")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        if advice is not None:
            os.environ["TRANSFORMERS_VERBOSITY"] = advice
