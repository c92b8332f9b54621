"""Cutting in memory: the model that is left computes what the original computes with those layers skipped."""

from __future__ import annotations

import json

import pytest
import torch

import census
import families
from layercut.cli.command_line import main
from layercut.models.decoder_stack import find_decoder, share
from layercut.segments import Segment, checked_segments
from layercut.surgery import cut_segment_

COMMON = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt2", "gpt_neox", "opt", "phi3"]


@pytest.mark.parametrize("model_type", COMMON)
def test_equals_the_original_with_those_layers_skipped(model_type):
    model = families.tiny(model_type)
    segments = [Segment(1, 2), Segment(4, 6)]
    wanted = census.reference_logits(model, segments)
    cut_segment_(model, segments)
    assert torch.equal(census.logits_of(model), wanted)
    assert len(find_decoder(model)) == families.LAYERS - 3
    assert model.config.original_layer_index == [0, 2, 3, 6, 7]


def test_segments_that_touch_are_one_cut(tiny_model, texts, tmp_path):
    given = [Segment(5, 6), Segment(2, 3), Segment(1, 2)]
    assert checked_segments(given, 8) == [Segment(1, 3), Segment(5, 6)]
    asked = [f"--data={texts[0]}", "--tokens=512", "--window=64", "--tune-tokens=0", f"--out={tmp_path}"]
    assert main(["tune", str(tiny_model), *asked, "--segment=2:3", "--segment=1:2"]) == 0
    assert json.loads((tmp_path / "cut.json").read_text())["segments"] == [[1, 3]]
    folded = json.loads((tmp_path / "fold.json").read_text())["fold"]
    assert [one["segment"] for one in folded] == [[1, 3]], "and folded once"


def test_two_cuts_compose_the_original_index():
    model = families.tiny("llama")
    cut_segment_(model, [Segment(0, 2)])
    cut_segment_(model, [Segment(1, 3)])
    assert model.config.original_layer_index == [2, 5, 6, 7]


def test_a_model_that_shares_the_weights_stays_as_it_was():
    model = families.tiny("gemma2")
    before = census.logits_of(model)
    other = share(model)
    cut_segment_(other, [Segment(2, 5)])
    assert torch.equal(census.logits_of(model), before)
    assert len(find_decoder(model)) == families.LAYERS
    assert len(find_decoder(other)) == families.LAYERS - 3
