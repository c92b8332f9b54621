"""Every decoder that transformers ships, cut in many ways: right to the bit, or refused with the reason.

By default a sample runs; `pytest -m families` runs all of it. New releases of transformers add rows by
themselves.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import census
import families
from layercut.segments import Segment

MUST_BE_RIGHT = [
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5_text", "gemma",
    "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "phi", "phi3", "gpt2", "gpt_neox", "gptj",
    "opt", "falcon", "stablelm", "olmo2", "cohere2", "granite", "glm4", "smollm3", "gpt_oss",
    "deepseek_v3", "llama4_text", "exaone4", "bamba", "nemotron_h", "qwen2_vl", "gemma3",
]  # fmt: skip
"""Right in the cuts sampled here, whatever else is refused."""

REFUSALS = {
    ("jamba", "odd"): "places expert layers by one period and offset, and none fits",
    ("gemma4_text", "last"): "cannot hold 'layer_types' of the layers that stay: layer 6 is 'sliding_attention'",
    ("bamba", "long"): r"no attention layer would be left \(they are \[2, 5\]\)",
    ("minimax", "first"): "linear attention layer, would come first",
    ("modernbert-decoder", "first"): "attn_norm is 'LayerNorm' and would become 'Identity'",
    ("beam", "middle"): "attn_residual_add_idx is 10 and would become 6",
    ("inkling2_text", "middle"): "blocks of 2 layers, and there would be fewer blocks",
    ("gemma3n_text, shared keys and values", "odd"): "layer 5 reuses the keys and values of layer 3, which",
    ("ernie4_5_moe, every second sparse", "odd"): "places expert layers by one interval, and none fits",
    ("glm_moe_dsa, shared indexers", "two"): "uses the tokens that layer 1's indexer picks, which would be removed",
}
"""Cuts that stock transformers cannot express, and what stands in the way."""


def judged(model_type: str, cut: str, folder: Path, **facts) -> census.Verdict:
    source = census.original(model_type, folder / "source", **facts)
    return census.judge(source, census.segments_of(cut), folder)


@pytest.mark.parametrize(
    ("model_type", "cut"), [(t, ("two", "odd", "middle")[i % 3]) for i, t in enumerate(MUST_BE_RIGHT)]
)
def test_sample_is_right(tmp_path, model_type, cut):
    verdict = judged(model_type, cut, tmp_path)
    assert (verdict.kind, verdict.why) == ("right", "")


@pytest.mark.parametrize(("name", "cut"), REFUSALS)
def test_refusal_names_what_stands_in_the_way(tmp_path, name, cut):
    model_type, facts = families.VARIANTS.get(name, (name, {}))
    verdict = judged(model_type, cut, tmp_path, **facts)
    assert verdict.kind == "refused"
    assert re.search(REFUSALS[name, cut], verdict.why), verdict.why
    assert "--segment" in verdict.why or name != model_type


@st.composite
def cuts(draw) -> list[Segment]:
    """One or two disjoint segments that leave at least one layer."""
    bounds = draw(st.lists(st.integers(0, families.LAYERS), min_size=2, max_size=4, unique=True).map(sorted))
    segments = [Segment(*pair) for pair in zip(bounds[::2], bounds[1::2], strict=False)]
    return segments if sum(map(len, segments)) < families.LAYERS else [Segment(1, families.LAYERS)]


@pytest.fixture(scope="module")
def source_of(tmp_path_factory) -> Callable[[str], census.Original]:
    """The model of a family, made once."""
    return cache(lambda model_type: census.original(model_type, tmp_path_factory.mktemp(model_type)))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    model_type=st.sampled_from(["llama", "gemma2", "gemma3_text", "qwen3_next", "jamba", "mixtral", "lfm2"]),
    segments=cuts(),
)
def test_any_segments_are_right_or_refused(tmp_path_factory, source_of, model_type, segments):
    verdict = census.judge(source_of(model_type), segments, tmp_path_factory.mktemp("any"))
    assert verdict.kind in ("right", "refused"), verdict.why
    if model_type in ("llama", "gemma2", "mixtral"):
        assert verdict.kind == "right"


ALL = [(t, t, {}) for t in families.model_types()] + [
    (name, t, facts) for name, (t, facts) in families.VARIANTS.items()
]


@pytest.mark.families
@pytest.mark.parametrize(("name", "model_type", "facts"), ALL, ids=[name for name, _, _ in ALL])
def test_family(tmp_path, name, model_type, facts):
    """All cuts of one family: none wrong."""
    try:
        source = census.original(model_type, tmp_path / "source", **facts)
    except Exception as error:
        pytest.skip(f"no tiny {model_type} can be built or run on text alone: {str(error)[:150]}")
    verdicts = {cut: census.judge(source, census.segments_of(cut), tmp_path) for cut in census.CUTS}
    if any(verdict.kind == "unjudged" for verdict in verdicts.values()):
        pytest.skip(source.trouble)
    assert {cut: v.why for cut, v in verdicts.items() if v.kind not in ("right", "refused")} == {}
