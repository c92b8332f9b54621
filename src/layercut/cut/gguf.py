"""Cut layers out of a GGUF file: blocks renumbered, their bytes untouched, per-layer metadata cut along.

llama.cpp describes layers by arrays in the metadata (sliced here), by a few numbers (counted anew), and for
some architectures by rules in its own source, such as "every sixth layer attends to everything". A file
cannot say otherwise, so cuts that break such a rule are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from layercut.cut.folder import appearing
from layercut.errors import ConfigError, LayercutError, ModelError, SurgeryError, first_line
from layercut.segments import Segment, checked_segments, kept_layers

PERIODS = {
    "gemma2": 2, "gemma3": 6, "gemma3n": 5, "cohere2": 4, "gpt-oss": 2, "llama4": 4, "exaone4": 4,
    "exaone-moe": 4, "smollm3": 4, "olmo2": 4, "plamo3": 8, "afmoe": 4, "gemma-embedding": 6, "mellum": 4,
    "step35": 4,
}  # fmt: skip
"""Architectures for which llama.cpp tells layers apart by their index modulo a number."""

WINDOW_ONLY = frozenset({"olmo2", "exaone4"})
"""Of these, those that do so only in files with a sliding window."""

PERIOD_KEYS = ("full_attention_interval", "interleave_moe_layer_step", "moe_every_n_layers")
"""Metadata numbers with the same meaning."""

COUNTED_FROM_FRONT = ("leading_dense_block_count", "hash_layer_count")
COUNTED_FROM_BACK = ("attention.shared_kv_layers",)
NOT_BY_LAYER = ("rope.dimension_sections",)
DEPENDS_ON_COUNT = {"minicpm3": "llama.cpp scales its residuals by the number of layers"}
PACKED_TENSORS = ("per_layer_token_embd.weight", "per_layer_model_proj.weight")
UNIFORM = frozenset(
    [
        "llama",
        "llama-embed",
        "deci",
        "qwen",
        "qwen2",
        "qwen2moe",
        "qwen2vl",
        "qwen3",
        "qwen3moe",
        "qwen3vl",
        "qwen3vlmoe",
        "phi2",
        "phi3",
        "phimoe",
        "gpt2",
        "gptj",
        "gptneox",
        "falcon",
        "bloom",
        "mpt",
        "starcoder",
        "starcoder2",
        "stablelm",
        "olmo",
        "olmoe",
        "gemma",
        "granite",
        "granitemoe",
        "granitehybrid",
        "command-r",
        "deepseek",
        "deepseek2",
        "glm4",
        "glm4moe",
        "chatglm",
        "internlm2",
        "mistral3",
        "nemotron",
        "nemotron_h",
        "minicpm",
        "bitnet",
        "refact",
        "xverse",
        "baichuan",
        "codeshell",
        "orion",
        "arctic",
        "exaone",
        "jais",
        "ernie4_5",
        "ernie4_5-moe",
        "hunyuan-dense",
        "hunyuan-moe",
        "dots1",
        "seed_oss",
        "apertus",
        "arcee",
        "lfm2",
        "lfm2moe",
        "falcon-h1",
        "mamba",
        "mamba2",
        "jamba",
        "dbrx",
        "grok",
        "plamo",
        "openelm",
        "dream",
        "llada",
        "bailingmoe",
        "bailingmoe2",
        "qwen3next",
        "qwen35",
        "qwen35moe",
        "minimax-m2",
        "mimo2",
        "kimi-linear",
    ]
)
"""Architectures whose layers differ only as their tensors and metadata arrays or the keys above say."""


def cut_gguf(
    file: Path,
    segments: Sequence[Segment],
    out: Path,
    *,
    force: bool = False,
    replaced: Mapping[str, tuple[Any, Any]] | None = None,
) -> None:
    """Write to `out` the GGUF file without the blocks of `segments`; kept tensors are byte-identical to the
    source's, but for those `replaced`: (data, GGML type) by their names in the cut file.

    Raises SurgeryError: llama.cpp could not be told what is left. ModelError: not a readable GGUF file, or it has
    no tensor of a replaced name.
    ConfigError: `out` is not named *.gguf. RunError: it exists (unless force), cannot be written, or the disk
    is full.
    """
    file, out = Path(file), Path(out)
    if out.suffix != ".gguf":
        raise ConfigError(f"{out} is not named as a GGUF file", f"--out {out.with_suffix('.gguf')}")
    reader = _open(file)
    name = _value(reader, "general.architecture", file)
    blocks = _value(reader, f"{name}.block_count", file)
    extra = int(
        _value(reader, f"{name}.nextn_predict_layers", file, 0)
    )  # prediction blocks, behind the layers
    layers = blocks - extra
    segments = checked_segments(segments, layers)
    try:
        _refuse(reader, name, file, kept_layers(segments, layers), layers)
    except SurgeryError as error:
        text = ", ".join(map(str, segments))
        hint = error.hint or _nearby(reader, name, file, segments, layers)
        raise SurgeryError(
            f"{file.name} ({name}): layers {text} cannot be cut out: {error.message}", hint
        ) from None
    kept = kept_layers(segments, layers)
    with appearing(
        out, force=force, need=sum(t.n_bytes for t in reader.tensors if _block(t.name) in {None, *kept})
    ) as work:
        _write(reader, work / out.name, name, kept, layers, blocks, replaced or {})


def _open(file: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ModelError(
            "reading GGUF files needs a package that is missing: gguf", 'pip install "layercut[gguf]"'
        ) from None
    try:
        return GGUFReader(file, "r")
    except Exception as error:  # the reader raises whatever its parsing runs into
        raise ModelError(
            f"{file} is corrupt, truncated or no GGUF file: {first_line(error)}", "fetch this file again"
        ) from None


def _value(reader: Any, key: str, file: Path, default: Any = None) -> Any:
    field = reader.get_field(key)
    if field is None:
        if default is None:
            raise ModelError(f"{file} has no {key} in its metadata", "give a GGUF file of a language model")
        return default
    return field.contents()


def _block(tensor: str) -> int | None:
    """blk.13.attn_q.weight -> 13; None for tensors outside the blocks."""
    parts = tensor.split(".")
    return int(parts[1]) if parts[0] == "blk" and len(parts) > 1 and parts[1].isdigit() else None


# --- what cannot be expressed ---------------------------------------------------------------------


def _refuse(reader: Any, name: str, file: Path, kept: Sequence[int], layers: int) -> None:
    if int(_value(reader, "split.count", file, 0)) > 1:
        raise SurgeryError(
            "it is one of several parts", "join them first: llama-gguf-split --merge FIRST.gguf WHOLE.gguf"
        )
    if name in DEPENDS_ON_COUNT:
        raise SurgeryError(
            DEPENDS_ON_COUNT[name], "cut the original checkpoint folder instead, then convert it"
        )
    if packed := [t.name for t in reader.tensors if t.name in PACKED_TENSORS]:
        raise SurgeryError(
            f"{packed[0]} packs a slice for every layer",
            "cut the original checkpoint folder instead, then convert it",
        )
    if name not in PERIODS and name not in UNIFORM:
        raise SurgeryError(
            f"layercut does not know how llama.cpp tells the layers of {name!r} apart",
            "cut the original checkpoint folder instead, then convert it",
        )
    for period, why in _periods(reader, name, file):
        odd = [i for new, i in enumerate(kept) if (i % period == period - 1) != (new % period == period - 1)]
        if odd:
            raise SurgeryError(f"{why}, and layer {odd[0]} would come to stand at {list(kept).index(odd[0])}")


def _periods(reader: Any, name: str, file: Path) -> Iterable[tuple[int, str]]:
    spelled_out = reader.get_field(f"{name}.attention.sliding_window_pattern")
    pattern = spelled_out.contents() if spelled_out is not None else None
    if isinstance(pattern, int) and not isinstance(pattern, bool) and pattern > 1:
        yield pattern, f"llama.cpp treats every {pattern}th layer apart (sliding_window_pattern)"
    elif name in PERIODS and not (
        name in WINDOW_ONLY and reader.get_field(f"{name}.attention.sliding_window") is None
    ):
        yield PERIODS[name], f"llama.cpp treats every {PERIODS[name]}th layer of {name} apart"
    for key in PERIOD_KEYS:
        if (period := int(_value(reader, f"{name}.{key}", file, 0))) > 1:
            yield period, f"llama.cpp treats every {period}th layer apart ({key})"
    if (
        name in ("qwen3next", "qwen35", "qwen35moe")
        and reader.get_field(f"{name}.full_attention_interval") is None
    ):
        yield 4, f"llama.cpp treats every 4th layer of {name} apart"


def _nearby(reader: Any, name: str, file: Path, segments: Sequence[Segment], layers: int) -> str:
    from layercut.cut.plan import neighbours

    found = []
    for candidate in neighbours(segments, layers):
        try:
            _refuse(reader, name, file, kept_layers(candidate, layers), layers)
        except LayercutError:
            continue
        found.append(" ".join(f"--segment {segment}" for segment in candidate))
    if not found:
        return "cut the original checkpoint folder instead, then convert it"
    return "segments near it that can: " + ", or ".join(found[:3])


# --- writing --------------------------------------------------------------------------------------


def _write(
    reader: Any,
    out: Path,
    name: str,
    kept: list[int],
    layers: int,
    blocks: int,
    replaced: Mapping[str, tuple[Any, Any]],
) -> None:
    from gguf import GGUFValueType, GGUFWriter

    kept_blocks = kept + list(range(layers, blocks))
    place = {old: new for new, old in enumerate(kept_blocks)}
    writer = GGUFWriter(out, name, endianess=reader.endianess)
    writer.data_alignment = reader.alignment
    earlier = None
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = field.contents()
        if field.name == "layercut.original_layer_index":
            earlier = value
            continue
        if field.name.startswith(f"{name}."):
            value = _cut_value(field.name[len(name) + 1 :], value, kept, kept_blocks, layers, blocks)
        kind = field.types[0]
        writer.add_key_value(
            field.name, value, kind, sub_type=field.types[-1] if kind == GGUFValueType.ARRAY else None
        )
    index = [earlier[i] for i in kept] if earlier else kept
    writer.add_key_value(
        "layercut.original_layer_index", index, GGUFValueType.ARRAY, sub_type=GGUFValueType.INT32
    )
    tensors = [(t, _renamed(t.name, place)) for t in reader.tensors]
    contents = {new: replaced.get(new, (t.data, t.tensor_type)) for t, new in tensors if new is not None}
    if unknown := replaced.keys() - contents.keys():
        raise ModelError(f"the GGUF file has no tensor {min(unknown)}", "give the file that the run began from")
    for new, (data, kind) in contents.items():
        writer.add_tensor_info(new, data.shape, data.dtype, data.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for new, (data, _) in contents.items():
        order = None if new in replaced else reader.endianess
        writer.write_tensor_data(data, tensor_endianess=order)
    writer.close()


def _cut_value(
    key: str, value: Any, kept: list[int], kept_blocks: list[int], layers: int, blocks: int
) -> Any:
    if key == "block_count":
        return len(kept_blocks)
    if key in COUNTED_FROM_FRONT:
        return sum(i < value for i in kept)
    if key in COUNTED_FROM_BACK:
        return sum(i >= layers - value for i in kept)
    if isinstance(value, list) and key not in NOT_BY_LAYER:
        if len(value) == blocks:
            return [value[i] for i in kept_blocks]
        if len(value) == layers:
            return [value[i] for i in kept]
    return value


def _renamed(tensor: str, place: dict[int, int]) -> str | None:
    block = _block(tensor)
    if block is None:
        return tensor
    return f"blk.{place[block]}.{tensor.split('.', 2)[2]}" if block in place else None
