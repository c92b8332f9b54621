"""Cut layers out of a GGUF file: blocks renumbered, their bytes untouched, per-layer metadata cut along.

llama.cpp describes layers by arrays in the metadata (sliced here), by a few numbers (counted again), and for
some architectures by rules in its own source (`models/llama_cpp_rules.py`), such as "every sixth layer attends to
everything". Where a file can say otherwise it is made to say so; cuts that break any other rule are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layercut.errors import ConfigError, LayercutError, SurgeryError
from layercut.files.writing import appearing
from layercut.models import llama_cpp_rules as rules
from layercut.models.gguf_header import block_of, open_gguf
from layercut.progress import say
from layercut.segments import Segment, checked_segments, kept_layers
from layercut.surgery.gguf_writer import write_gguf

PACKED_TENSORS = ("per_layer_token_embd.weight", "per_layer_model_proj.weight")
_CUT_FOLDER = "cut the original checkpoint folder instead, then convert it"


def cut_gguf(
    file: Path,
    segments: Sequence[Segment],
    out: Path,
    *,
    force: bool = False,
    replaced: Mapping[str, tuple[Any, Any]] | None = None,
    full: Sequence[bool] | None = None,
    as_loaded: bool = False,
) -> None:
    """Write to `out` the GGUF file without the blocks of `segments`; kept tensors are copied byte for byte."""
    file, out = Path(file), Path(out)
    if out.suffix != ".gguf":
        raise ConfigError(f"{out} is not named as a GGUF file", f"--out {out.with_suffix('.gguf')}")
    header, reader = open_gguf(file, as_loaded=as_loaded)
    name, layers, facts = header.architecture, header.layers, header.facts()
    if header.count("split.count", 0) > 1:
        hint = "join them first: llama-gguf-split --merge FIRST.gguf WHOLE.gguf"
        raise SurgeryError(f"{file.name} is one of several parts", hint)
    segments = checked_segments(segments, layers)
    kept = kept_layers(segments, layers)
    changes: dict[str, Any] = {}
    if segments:
        try:
            _refuse(reader, name, facts, kept, layers)
        except SurgeryError as error:
            text = ", ".join(map(str, segments))
            hint = error.hint or _nearby(reader, name, facts, segments, layers)
            raise SurgeryError(
                f"{file.name} ({name}): layers {text} cannot be cut out: {error.message}", hint
            ) from None
        changes = _made_explicit(name, facts, kept, layers)
    if full is not None:
        changes[rules.PATTERN] = [not each for each in full]
    need = sum(t.n_bytes for t in reader.tensors if block_of(t.name) in {None, *kept})
    with appearing(out, force=force, need=need, source=Path(file)) as work:
        if rules.PATTERN in changes and segments:
            note = f"which layers slide is written as {rules.PATTERN}, which llama.cpp reads"
            say("note", f"{note} from {rules.NEEDS_BUILD} on")
        write_gguf(reader, work / out.name, name, kept, layers, header.blocks, changes, replaced or {})


# --- what cannot be expressed ---------------------------------------------------------------------


def _refuse(reader: Any, name: str, facts: dict[str, Any], kept: Sequence[int], layers: int) -> None:
    if why := rules.broken_by_count(name, facts, layers, len(kept)):
        raise SurgeryError(why, _other_count(name, facts, layers, len(kept)) or _CUT_FOLDER)
    if packed := [t.name for t in reader.tensors if t.name in PACKED_TENSORS]:
        raise SurgeryError(f"{packed[0]} packs a slice for every layer", _CUT_FOLDER)
    if not rules.known(name):
        raise SurgeryError(f"layercut does not know how llama.cpp distinguishes the layers of {name!r}", _CUT_FOLDER)
    for period, why in rules.periods(name, facts):
        odd = rules.off_period(period, kept)
        if odd and not _pattern_can_say(name, facts):
            raise SurgeryError(f"{why}, and layer {odd[0]} would get the index {list(kept).index(odd[0])}")


def _pattern_can_say(name: str, facts: dict[str, Any]) -> bool:
    """Whether an array may take the place of the architecture's own period."""
    return name in rules.PERIODS and rules.PERIODS[name].array and not any(key in facts for key in rules.PERIOD_KEYS)


def _other_count(name: str, facts: dict[str, Any], layers: int, after: int) -> str:
    """The nearest number of layers to remove that breaks no rule on their number."""
    sound = [n for n in range(1, layers) if not rules.broken_by_count(name, facts, layers, n)]
    if not sound:
        return ""
    nearest = min(sound, key=lambda n: (abs(n - after), -n))
    return f"remove {layers - nearest} layers instead of {layers - after}, or {_CUT_FOLDER}"


def _made_explicit(name: str, facts: dict[str, Any], kept: Sequence[int], layers: int) -> dict[str, Any]:
    """Metadata that the cut file needs where llama.cpp would derive something else from it."""
    changes: dict[str, Any] = {
        default.key: default.value(layers) for default in rules.DEFAULTS.get(name, ()) if default.key not in facts
    }
    full = rules.full_layers(name, facts, layers)
    if full and _pattern_can_say(name, facts) and not isinstance(facts.get(rules.PATTERN), list):
        left = [full[i] for i in kept]
        if left != rules.full_layers(name, facts, len(kept)):
            changes[rules.PATTERN] = [not each for each in left]
    return changes


def _nearby(reader: Any, name: str, facts: dict[str, Any], segments: Sequence[Segment], layers: int) -> str:
    from layercut.surgery.planning import neighbours

    found = []
    for candidate in neighbours(segments, layers):
        try:
            _refuse(reader, name, facts, kept_layers(candidate, layers), layers)
        except LayercutError:
            continue
        found.append(" ".join(f"--segment {segment}" for segment in candidate))
    if not found:
        return _CUT_FOLDER
    return "segments near it that can: " + ", or ".join(found[:3])
