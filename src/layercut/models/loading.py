"""From the files of a checkpoint (`models/checkpoints.py`) to a causal language model and its stack of decoder layers.

Nothing a checkpoint contains is executed: remote code and pickled weights are refused unless asked for.
"""

from __future__ import annotations

import copy
import io
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layercut.distributed import processes, sharding
from layercut.errors import ModelError, first_line
from layercut.files.reading import LARGEST_JSON, REFETCH, open_regular
from layercut.models import checkpoints, config_checks, gguf_twins
from layercut.models.checkpoints import Checkpoint, read_json
from layercut.models.config_checks import COUNTS
from layercut.models.gguf_config import check_size, correct_
from layercut.models.gguf_header import read_header
from layercut.progress import say

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model",
)  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INSTRUCTIONS = {torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"), torch.float16: ()}
"""What a CPU must have to multiply matrices of a dtype as fast as of float32, by torch's names; any of them."""


@dataclass(frozen=True)
class Decoder:
    """Where a model keeps its decoder layers."""

    path: str
    """Dotted name of the list inside the model, e.g. "model.layers"."""
    layers: Any
    """An nn.ModuleList; a few architectures keep an nn.ModuleDict."""
    config: Any
    """The (text) config that counts these layers."""

    def __len__(self) -> int:
        return len(self.layers)


@dataclass
class LanguageModel:
    """A loaded model with its tokenizer and where it came from."""

    model: Any
    tokenizer: Any
    checkpoint: Checkpoint
    dtype: torch.dtype
    """The dtype it is computed in; `stored_dtype(model)` is the one it is saved in."""
    device: torch.device

    @property
    def decoder(self) -> Decoder:
        """The model's list of decoder layers: `find_decoder`."""
        return find_decoder(self.model)


# --- from files to a model ----------------------------------------------------------------------------------


def load_config(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Any:
    """The config of a checkpoint, refused unless it is a decoder-only language model's."""
    from transformers import AutoConfig

    if not checkpoint.gguf:
        checkpoints.check_config(checkpoint.folder)
        if not trust_remote_code:
            _refuse_remote_code(checkpoint.folder)
    header = read_header(checkpoint.file) if checkpoint.gguf else None
    try:
        if header:
            told = checkpoint.file.stat()  # all that changes where the content does, as a fingerprint's memo has it
            stamp = told.st_ino, told.st_size, told.st_mtime_ns, told.st_ctime_ns
            config = copy.deepcopy(_gguf_config(checkpoint.file, stamp))
            correct_(config, header)
        else:
            config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
    except ModelError:
        raise
    except ImportError as error:
        raise _missing_package(error) from None
    except Exception as error:
        raise ModelError(
            f"the config of {checkpoint.name} cannot be read: {first_line(error)}",
            "check that this version of transformers knows the architecture: pip install -U transformers",
        ) from error
    check_causal(config, checkpoint.name, trust_remote_code=trust_remote_code)
    return config


@lru_cache(maxsize=4)
def _gguf_config(file: Path, stamp: tuple[int, ...]) -> Any:
    """A GGUF file's config, tied where the file keeps its embeddings twice; kept until the file's stamp is another.

    transformers reads every token's text to find it: 3 seconds for 49,000 tokens, 10 for 152,000.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    config.tie_word_embeddings = config.tie_word_embeddings or read_header(file).finer_twin is not None
    return config


def _refuse_remote_code(folder: Path) -> None:
    from transformers import CONFIG_MAPPING

    raw = read_json(folder / "config.json")
    if "auto_map" in raw and raw.get("model_type") not in CONFIG_MAPPING:
        raise ModelError(
            f"{folder.name} brings its own modelling code, which layercut does not run",
            "pass --trust-remote-code if you have read that code and trust it",
        )


def check_causal(config: Any, name: str, *, trust_remote_code: bool = False) -> None:
    """Accept only decoder-only language models, and vision-language models whose text part is one."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name} is an encoder-decoder model ({config.model_type}); layercut cuts decoder-only models",
            "give a causal language model such as Llama, Qwen or Gemma",
        )
    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    known = any(type(config) in mapping for mapping in mappings)
    remote = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not (known or remote):
        raise ModelError(
            f"{name} is not a causal language model (model type {config.model_type!r})",
            "give a causal language model such as Llama, Qwen or Gemma",
        )
    heads = getattr(config, "architectures", None) or []
    usual = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    classes = set().union(*(_class_names(mapping, config) for mapping in mappings))
    if heads and not any(h.endswith(usual) or h in classes for h in heads):
        raise ModelError(
            f"{name} is a checkpoint of {', '.join(heads)}, which is not a causal language model",
            "give the checkpoint with the language-modelling head",
        )


def _class_names(mapping: Any, config: Any) -> set[str]:
    """Names of the classes that a mapping of transformers gives for this config."""
    found = mapping.get(type(config), ())
    return {cls.__name__ for cls in (found if isinstance(found, tuple) else (found,))}


def load(
    checkpoint: Checkpoint,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    tokenizer: Any = None,
) -> LanguageModel:
    """Load weights, and the tokenizer where it is not given."""
    config = load_config(checkpoint, trust_remote_code=trust_remote_code)
    place = pick_device(device)
    stored = pick_dtype(dtype, config, checkpoint)
    number = computing_dtype(dtype, stored, place)
    auto = auto_class(config, trust_remote_code=trust_remote_code)
    refuse_larger(config, checkpoint, trust_remote_code=trust_remote_code)
    with quiet_transformers():
        try:
            if checkpoint.gguf:
                model = _load_gguf(checkpoint, config, stored)
            else:
                options = {"trust_remote_code": trust_remote_code, "use_safetensors": None if allow_pickle else True}
                # packed weights are unpacked in the dtype they are stored in: a loader's own arithmetic
                model = _load_folder(auto, checkpoint, config, stored if _is_quantized(config) else number, options)
            if number != stored:
                convert_parameters_(model, number)
        except ModelError:
            raise
        except ImportError as error:
            raise _missing_package(error) from None
        except Exception as error:  # a class that divides by what a config says fails with any of them
            raise ModelError(
                f"{checkpoint.name} cannot be loaded: {first_line(error)}",
                "check that the checkpoint is complete and that this version of transformers knows it",
            ) from error
    tokenizer = tokenizer or load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
    model = model.to(place).eval().requires_grad_(False)
    model.stored_dtype = stored
    return LanguageModel(model, tokenizer, checkpoint, number, place)


SAMPLE = "The quick brown fox jumps over 13 lazy dogs.\n"
SLACK = 2**26
"""Numbers that a model may have beyond twice those stored: tables that classes compute, such as attention masks."""


def refuse_larger(config: Any, checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> None:
    """Refuse a config that calls for far more numbers than the files hold, before memory is taken for them.

    transformers fills what is missing or of another shape with random numbers, however many, and reports it afterwards
    (`check_loading`). Quantized and pickled weights, and GGUF, are not counted.
    """
    if checkpoint.gguf or _is_quantized(config) or not checkpoints.weight_files(checkpoint.folder):
        return
    with quiet_transformers(), torch.device("meta"):
        try:
            model = auto_class(config, trust_remote_code=trust_remote_code).from_config(
                copy.deepcopy(config), trust_remote_code=trust_remote_code
            )
        except Exception:  # loading builds the class likewise, and says what is wrong
            return
    wanted = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    stored = checkpoints.stored_elements(checkpoint.folder)
    if wanted > 2 * stored + SLACK:
        raise ModelError(
            f"the config of {checkpoint.name} calls for {wanted:,} weights, and its files hold {stored:,}",
            "give the config.json that belongs to these weights",
        )


def check_tokens(tokens: torch.Tensor, config: Any, name: str) -> None:
    """Refuse tokens that the model has no embedding for."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    if isinstance(size, int) and tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < size:
        worst = int(tokens.max()) if int(tokens.max()) >= size else int(tokens.min())
        raise ModelError(
            f"the tokenizer of {name} gives token {worst:,}, and the model's vocabulary has {size:,}",
            "give the tokenizer files that belong to this model",
        )


def auto_class(config: Any, *, trust_remote_code: bool = False) -> Any:
    """transformers' automatic class for a config: of language models, or of vision-language models."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    # transformers names remote code in its own mapping only; a known config takes its stock class
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or trust_remote_code:
        return AutoModelForCausalLM
    return AutoModelForImageTextToText


def build(config: Any, dtype: torch.dtype) -> Any:
    """The stock class of a config with initial weights, in eval mode, on torch's default device."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    auto = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText
    with quiet_transformers():
        try:
            return auto.from_config(config, dtype=dtype).eval().requires_grad_(False)
        except Exception as error:
            raise ModelError(
                f"no model can be built from this config: {first_line(error)}",
                "check config.json, and that this version of transformers knows the architecture",
            ) from error


def skeleton(config: Any, dtype: torch.dtype) -> Any:
    """The model without memory, on the meta device."""
    with torch.device("meta"):
        return build(config, dtype)


def _unmark_quantized_(model: Any) -> None:
    """Take off what transformers remembers of a quantization that is undone, and for which it would not save."""
    model.hf_quantizer = None
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    for name in ("quantization_method", "is_quantized"):
        model.__dict__.pop(name, None)


def _is_quantized(config: Any) -> bool:
    return getattr(config, "quantization_config", None) is not None


def _decompress_(model: Any) -> None:
    """A model of weights packed by compressed-tensors becomes a plain one: those weights, in its dtype.

    Else transformers would do half of this in the first forward, and save a model that is neither.
    """
    compressor = getattr(getattr(model, "hf_quantizer", None), "compressor", None)
    if compressor is None:
        return
    from compressed_tensors.compressors.base import decompress_module

    compressor.remove_decompression_hook(model)
    for module in model.modules():
        decompress_module(module, leave_decompressed=False)
    _unmark_quantized_(model)
    model.tie_weights()


def _load_folder(auto: Any, checkpoint: Checkpoint, config: Any, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    """A folder's model by transformers' automatic class; every weight has to be in the folder, in its shape."""
    with redirect_stderr(io.StringIO()) if _is_quantized(config) else nullcontext():  # its bars
        model, info = auto.from_pretrained(
            checkpoint.folder,
            config=config,
            dtype=dtype,
            ignore_mismatched_sizes=True,  # refused by name
            output_loading_info=True,
            **options,
        )
    check_loading(info, checkpoint.name)
    _decompress_(model)
    return model


def _load_gguf(checkpoint: Checkpoint, config: Any, dtype: torch.dtype) -> Any:
    """Dequantize a GGUF file into a model that `save_pretrained` accepts; every weight has to be in the file.

    transformers marks what it read from GGUF as quantized and refuses to save it; after dequantizing, that
    mark is no longer true, so it is taken off.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    header = read_header(checkpoint.file)
    check_size(config, header, AutoModelForCausalLM)
    if finer := header.finer_twin:
        config.tie_word_embeddings = False  # until both are read
    with redirect_stderr(io.StringIO()):  # its bar does not ask whether bars are wanted
        model, info = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder,
            config=config,
            gguf_file=checkpoint.gguf_path,
            dtype=dtype,
            quantization_config=GgufConfig(dequantize=True),
            ignore_mismatched_sizes=True,  # refused by name
            output_loading_info=True,
        )
    check_loading(info, checkpoint.name)
    _unmark_quantized_(model)
    model.config.architectures = [type(model).__name__]
    model.config._name_or_path = checkpoint.name
    if finer:
        gguf_twins.tie_(model, finer)
        _say_once(f"{checkpoint.name} keeps its tied embeddings twice: read once, from {finer}, the finer rounding")
    convert_parameters_(model, dtype)
    return model


@lru_cache
def _say_once(words: str) -> None:
    """In a run a model is loaded more than once."""
    say("note", words)


def convert_parameters_(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert a model's parameters to a dtype, in place.

    Never model.to(dtype): that would round the rotary frequencies too, a buffer which a reload keeps in float32.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def load_tokenizer(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint, tried on a line of text; of a GGUF file its own, where that can be read."""
    if not checkpoint.gguf:
        check_tokenizer_files(checkpoint.folder)
        return _tokenizer_in(checkpoint.folder, checkpoint, trust_remote_code)
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

    with quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, gguf_file=checkpoint.gguf, trust_remote_code=trust_remote_code
            )
            tokenizer(SAMPLE)
            return tokenizer
        except BaseException as error:
            # the library in Rust ends in a kind of its own that is no Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ModelError(
                f"the tokenizer of {checkpoint.name} cannot be loaded: {first_line(error)}",
                "copy tokenizer.json and tokenizer_config.json of the original model into the folder",
            ) from error


def check_tokenizer_files(folder: Path) -> None:
    """Refuse a folder without a tokenizer, or whose tokenizer files are of a kind or size that none has."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(
            f"{folder} holds no tokenizer",
            "copy tokenizer.json and tokenizer_config.json of the original model into the folder",
        )
    for name in TOKENIZER_FILES:
        if not (folder / name).exists():
            continue
        with open_regular(folder / name) as opened:
            size = os.fstat(opened.fileno()).st_size
        if size > LARGEST_JSON:
            raise ModelError(f"{folder / name} has {size:,} bytes; allowed are {LARGEST_JSON:,}", REFETCH)
    if (folder / "tokenizer_config.json").exists():
        file = folder / "tokenizer_config.json"
        config_checks.check_tokenizer_config(read_json(file), str(file))


def pick_device(device: str) -> torch.device:
    """The device of a name; "auto" takes the first accelerator that torch sees, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if device == "auto":
        place = accelerator or torch.device("cpu")
        processes.check_device(place)
        return place
    try:
        place = torch.device(device)
    except RuntimeError:
        raise ModelError(f"no device {device!r}", "allowed are auto, cpu, cuda, cuda:N, mps, xpu") from None
    if place.type != "cpu" and (accelerator is None or place.type != accelerator.type):
        raise ModelError(f"device {device!r} is not available on this machine", "use --device cpu, or --device auto")
    if place.index is not None and place.type != "cpu" and place.index >= torch.accelerator.device_count():
        raise ModelError(
            f"device {device!r} is not there: this machine has {torch.accelerator.device_count()}",
            f"use --device {place.type}:0",
        )
    processes.check_device(place)
    return place


def pick_dtype(dtype: str, config: Any, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that the weights are saved in; see `load` for what "auto" means."""
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

    Such a CPU takes nine times as long over bfloat16 as over float32 (AVX2, docs/log.md).
    """
    if dtype != "auto" or device.type != "cpu" or stored not in INSTRUCTIONS:
        return stored
    return stored if any(cpu_has(feature) for feature in INSTRUCTIONS[stored]) else torch.float32


def cpu_has(feature: str) -> bool:
    """Whether this CPU has some instructions, by torch's names; none where torch cannot say."""
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(known.get(feature))


def check_loading(info: dict[str, Any], name: str) -> None:
    """Refuse missing or mismatched weights, which transformers fills with random numbers and only warns of."""
    missing = sorted(info.get("missing_keys") or [])
    mismatched = sorted(info.get("mismatched_keys") or [])
    if missing:
        raise ModelError(
            f"{name} lacks {len(missing)} weights that its config calls for (first: {missing[0]})",
            "the checkpoint is incomplete, or num_hidden_layers in its config.json does not fit it",
        )
    if mismatched:
        weight, stored, wanted = mismatched[0]
        raise ModelError(
            f"{name} holds {len(mismatched)} weights of another shape than its config calls for "
            f"(first: {weight} is {list(stored)}, called for is {list(wanted)})",
            "give the config.json that belongs to these weights",
        )


def _missing_package(error: ImportError) -> ModelError:
    if "flash" in str(error).lower():
        return ModelError(
            f"the config asks for an attention implementation that is missing here: {first_line(error)}",
            "take attn_implementation out of config.json: transformers then chooses one",
        )
    extra = "quantize" if "compressed" in str(error) else "gguf"
    return ModelError(
        f"reading this model needs a package that is missing: {first_line(error)}",
        f'pip install "layercut[{extra}]"',
    )


# --- the stack of decoder layers ----------------------------------------------------------------------------


OTHER_TOWERS = ("vision", "visual", "audio", "encoder", "image", "speech", "mtp", "depth_decoder")
"""Parts of a model whose layers are not the decoder's, by a word in their path."""


def count_layers(config: Any) -> int:
    """L, the number of decoder layers that a config promises; the model's own stack has the last word."""
    text = config.get_text_config(decoder=True)
    found = [value for name in COUNTS if isinstance(value := getattr(text, name, None), int)]
    if not found:
        raise ModelError(
            f"the config of this {config.model_type!r} does not count its layers ({', '.join(COUNTS)})",
            "use the model's own config.json",
        )
    return found[0]


REPORTED_WINDOW = 2048
"""Tokens in the windows that perplexities are reported on, where a model reaches so far: the field's length."""


POSITIONS = ("max_position_embeddings", "max_seq_len", "max_target_positions")
"""What configs call their number of positions: MPT the second, the decoders of Whisper the third."""
BEHIND_PADDING = {
    "camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip
"""Model types whose first token has the position behind the padding's: that many fewer are left."""


def positions(config: Any) -> int | None:
    """How many tokens in a row a model has positions for; None where its config sets no limit."""
    text = config.get_text_config()
    found = (value for name in POSITIONS if isinstance(value := getattr(text, name, None), int) and value > 0)
    limit = next(found, None)
    if limit is not None and text.model_type in BEHIND_PADDING:
        limit -= (text.pad_token_id or 0) + 1
    return limit


def reported_window(config: Any) -> int:
    """Tokens in a window that perplexity is reported on, where the user asks for none."""
    return min(REPORTED_WINDOW, positions(config) or REPORTED_WINDOW)


def find_decoder(model: Any) -> Decoder:
    """The ModuleList of decoder layers of any architecture, and the config that counts them.

    Searched inside the text model only, so that vision or audio towers never match.
    """
    config = model.config.get_text_config(decoder=True)
    counts = {value for name in COUNTS if isinstance(value := getattr(config, name, None), int)}
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) in counts
    ]
    # BERT's relatives keep their decoder under `encoder`: only prefer what is in no other tower
    lists = [item for item in lists if not _in_other_tower(item[0])] or lists
    if not lists:
        raise ModelError(
            f"no stack of {' or '.join(map(str, sorted(counts))) or 'any number of'} decoder layers "
            f"was found in {type(model).__name__}",
            "this architecture is not supported; see docs/families.md for those that are",
        )
    # Of nested lists the outermost is the stack; of several, the one that weighs most.
    path, layers = max(lists, key=lambda item: (-item[0].count("."), _weight(item[1])))
    return Decoder(path, layers, config)


def _in_other_tower(path: str) -> bool:
    return any(word in path for word in OTHER_TOWERS)


def _weight(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


STREAMED = "the model's layers are left on disk: for this it has to be in memory"
STREAMED_HINT = "from disk run search, compress, tune and evaluate; with enough memory: --stream off"


def share(model: Any) -> Any:
    """A second model over the same weights: own modules and config, the very same parameters and buffers.

    Cutting or retraining layers of the clone leaves the original as it is, and memory is used once.
    """
    if getattr(model, "layers_on_disk", None):
        raise ModelError(STREAMED, STREAMED_HINT)
    return copied(model)


def copied(model: Any) -> Any:
    """Own modules and config, the very same parameters and buffers, with data or without."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): t for t in tensors})


def replace_parameters_(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Put new parameters in by name, also where they are tied to another name; tensors of other models stay."""
    everywhere = list(model.named_parameters(remove_duplicate=False))
    resident = next(parameter.device for _, parameter in everywhere if not parameter.is_meta)
    for name, weight in weights.items():
        old = model.get_parameter(name)  # of a layer on disk, it has no data
        new = sharding.like(old, weight.to(resident) if old.is_meta else weight)
        for place in [name, *(other for other, parameter in everywhere if parameter is old and other != name)]:
            owner, _, attribute = place.rpartition(".")
            setattr(model.get_submodule(owner), attribute, new)


def parameter_count(model: nn.Module) -> int:
    """Number of weights, tied ones counted once."""
    return sum(p.numel() for p in model.parameters())


def stored_dtype(model: Any) -> torch.dtype:
    """The dtype a model is saved in. It computes in this one, or in a wider one (`computing_dtype`)."""
    return getattr(model, "stored_dtype", None) or model.dtype


def weight_as_stored(weight: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    """A weight in the dtype that its model is saved in, or itself where it has values that this one does not hold."""
    narrow = weight.to(stored)
    return narrow if torch.equal(narrow.to(weight.dtype), weight) else weight


def as_stored(model: Any) -> Any:
    """The model in the dtype it is saved in: itself, or a copy where it computes in a wider one.

    Nothing is lost: what is loaded, folded, tuned or quantized is rounded to this format at once. A weight with other
    values, as a class may keep some in float32, stays as it is; beside a cut it is tuned as it is.
    """
    stored = stored_dtype(model)
    if stored == model.dtype:
        return model
    narrow, new = share(model), {}
    for module in narrow.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in new:
                kept = weight_as_stored(parameter.detach(), stored)
                new[id(parameter)] = nn.Parameter(kept, requires_grad=False)
            setattr(module, name, new[id(parameter)])
    return narrow


def parameter_bytes(model: nn.Module, stored: torch.dtype | None = None) -> int:
    """Bytes of the weights as saved, tied ones counted once."""
    number = stored or getattr(model, "stored_dtype", None)
    return sum(p.numel() * min(p.itemsize, number.itemsize if number else p.itemsize) for p in model.parameters())


# --- small helpers ------------------------------------------------------------------------------------------


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


@contextmanager
def as_just_loaded(model: Any) -> Iterator[None]:
    """While open, the head's weight takes gradients, as transformers leaves it; for generation, which computes none.

    Of rows that are not contiguous, as the last token's of a prompt, torch multiplies each by a copy of a weight that
    takes no gradients: with 512 tokens of SmolLM2-135M in bfloat16 on a CPU that was an eighth of the prefill.
    """
    weight = getattr(model.get_output_embeddings(), "weight", None)
    weights = [weight] if isinstance(weight, nn.Parameter) and weight.is_floating_point() else []
    with taking_gradients([weight for weight in weights if not weight.is_inference()], True):
        yield


@contextmanager
def taking_gradients(weights: Sequence[nn.Parameter], flag: bool) -> Iterator[None]:
    """While open, the weights take gradients, or none does; afterwards those do that did before."""
    before = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(flag)
        yield
    finally:
        for weight, own in zip(weights, before, strict=True):
            weight.requires_grad_(own)
