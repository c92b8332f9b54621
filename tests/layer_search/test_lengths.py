"""Lengths from budgets: arithmetic against counting, loss against the model that is really cut; the command line."""

import json
import math
import re

import pytest
import torch

import tiny
from layercut import files
from layercut.cli.command_line import main
from layercut.config import QuantizeConfig, SearchConfig
from layercut.errors import ConfigError
from layercut.files import parse_bytes
from layercut.layer_search import SearchResult, longest_within, perplexity_rise, split_rows
from layercut.layer_search.budgets import length_for_size
from layercut.layer_search.result import Candidate, Cost
from layercut.models import checkpoints, decoder_stack, loading
from layercut.models.losses import next_token_loss
from layercut.models.runner import DecoderRunner
from layercut.quantization.packing import saved_bytes
from layercut.report import formatting
from layercut.segments import Segment
from layercut.surgery import cut_segment_


@pytest.mark.parametrize(
    ("text", "size"),
    [("200MB", 200e6), ("1.5GiB", 1.5 * 2**30), (" 3 kb", 3000), ("512", 512), ("1MiB", 2**20), (".5gb", 5e8)],
)
def test_sizes_are_read(text, size):
    assert parse_bytes("--target-size", text) == size


@pytest.mark.parametrize("text", ["", "MB", "-3MB", "1.2.3MB", "3 apples", "0MB", "3iB", "nan"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match="no size"):
        SearchConfig(target_size=text)


def test_a_size_is_met_by_as_few_layers_as_any_cut_allows():
    model = tiny.llama()
    total = decoder_stack.parameter_bytes(model)
    weights = [decoder_stack.parameter_bytes(layer) for layer in DecoderRunner(model).layers]
    for n in range(1, 8):
        student = decoder_stack.share(model)
        cut_segment_(student, [Segment(0, n)])
        exact = decoder_stack.parameter_bytes(student)
        assert length_for_size(weights, total, exact) == n
        if n < 7:
            assert length_for_size(weights, total, exact - 1) == n + 1
    assert length_for_size([1, 9, 9, 1], 100, 98) == 2, "whichever two are removed, it is met"
    with pytest.raises(ConfigError, match="no cut of layers meets"):
        length_for_size(weights, total, exact - 1)
    with pytest.raises(ConfigError, match="is no cut"):
        length_for_size(weights, total, total)


def test_the_rise_of_perplexity_is_that_of_the_real_cut():
    model, tokens = tiny.llama(), tiny.some_tokens()
    student = decoder_stack.share(model)
    cut_segment_(student, [Segment(1, 2), Segment(5, 7)])
    losses = [next_token_loss(m(input_ids=tokens, use_cache=False).logits, tokens).mean() for m in (model, student)]
    expected = (losses[1].exp() / losses[0].exp() - 1).item()
    assert perplexity_rise(DecoderRunner(model), tokens, (Segment(1, 2), Segment(5, 7))) == pytest.approx(
        expected, rel=1e-4
    )


@pytest.mark.parametrize("allowed", range(1, 8))
def test_the_longest_cut_within_a_budget_is_found(allowed):
    def find(length):
        return SearchResult("made up", [Candidate((Segment(0, length),), 0.0)], Cost(layer_forwards=10))

    within = longest_within(0.1, range(1, 8), find, lambda cuts: 0.1 if len(cuts[0]) <= allowed else 0.2)
    assert within.result.segments == [Segment(0, allowed)]
    assert within.rise == 0.1
    assert len(within.lengths) <= 3
    assert within.result.cost.layer_forwards == 10 * len(within.lengths), "of all searches"
    assert set(within.lengths[0]) == {"length", "segments", "rise"}
    with pytest.raises(ConfigError, match=r"--max-loss 0.05: the best found removes 0:1 and raises perplexity by 20"):
        longest_within(0.05, range(1, 8), find, lambda cuts: 0.2 * len(cuts[0]))


def test_rows_that_verify_are_not_searched_on():
    rows, unseen = split_rows(torch.arange(10)[:, None])
    assert torch.equal(torch.cat([rows, unseen])[:, 0], torch.arange(10))
    assert len(unseen) == 2
    with pytest.raises(ConfigError, match="one row"):
        split_rows(torch.zeros(1, 8))


REFUSED = {
    "no loss at all": ({"max_loss": 0.0}, "--max-loss 0 is not above 0"),
    "loss nan": ({"max_loss": math.nan}, "--max-loss nan"),
    "no segments": ({"ratio": 0.2, "num_segments": 0}, "--num-segments 0 is too small"),
    "several by a baseline": ({"ratio": 0.2, "num_segments": 2, "method": "cosine"}, "not for --method cosine"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_options_that_do_not_go_together_are_refused(kind):
    given, words = REFUSED[kind]
    with pytest.raises(ConfigError, match=words):
        SearchConfig(**given)


def search(tiny_model, texts, out, *flags):
    arguments = [f"--data={texts[0]}", "--tokens=128", "--window=16"]
    code = main(["search", str(tiny_model), *arguments, f"--out={out}", *flags])
    return code, json.loads((out / "search.json").read_text()) if code == 0 else None


def test_a_size_is_counted_in_the_bits_that_are_saved(tiny_model, texts, tmp_path, capsys):
    """As few layers as meet it once they are rounded, by plan and run; in 16 bits far more would have to go."""
    flags = [f"--data={texts[0]}", "--tokens=128", "--window=16", "--bits=4", "--quantizer=rtn", "--group-size=16"]
    flags += ["--method=cosine", "--preserve=none", "--tune-tokens=0", "--no-speed", f"--eval-data={texts[1]}"]
    flags += ["--eval-tokens=128"]
    config = QuantizeConfig(bits=4, quantizer="rtn", group_size=16)
    dense = loading.load(checkpoints.resolve(str(tiny_model))).model
    saved = saved_bytes(dense, config, decoder_stack.stored_dtype(dense))
    target = saved.total - 2 * saved.layers[0]
    assert main(["plan", str(tiny_model), *flags[1:6], "--no-calibrate", "--json", f"--target-size={target}"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"]["after"] == 8 - 2
    out = tmp_path / "run"
    plain = [*flags[:3], "--method=cosine", f"--target-size={target}", f"--out={tmp_path / 'plain'}"]
    assert main(["search", str(tiny_model), "--preserve=none", *plain]) == 0, "in 16 bits, of which nothing is taken"
    assert main(["compress", str(tiny_model), *flags, f"--target-size={target}", f"--out={out}"]) == 0
    found = json.loads((out / "quantize.json").read_text())["bytes"]
    assert target - saved.layers[0] < found["after"] <= target
    assert main(["compress", str(tiny_model), *flags, f"--target-size={saved.total}", f"--out={tmp_path / 'no'}"]) == 2
    assert "the model's weights in 4 bits are" in capsys.readouterr().err


def test_budgets_from_the_command_line(tiny_model, texts, tmp_path, capsys, monkeypatch):
    config = json.loads((tiny_model / "config.json").read_text())
    assert config["num_hidden_layers"] == 8
    dense = loading.load(checkpoints.resolve(str(tiny_model))).model
    target = decoder_stack.parameter_bytes(dense) - 2 * decoder_stack.parameter_bytes(DecoderRunner(dense).layers[0])
    _, found = search(tiny_model, texts, tmp_path / "size", f"--target-size={target}")
    assert sum(stop - start for start, stop in found["segments"]) == 2
    assert found["segments"] == found["candidates"][0]["segments"]

    _, found = search(tiny_model, texts, tmp_path / "loss", "--max-loss=0.5")
    assert found["budget"]["rise"] <= 0.5
    assert [t["segments"] for t in found["budget"]["lengths"] if t["rise"] <= 0.5][-1] == found["segments"]
    capsys.readouterr()
    monkeypatch.setattr(
        "layercut.pipeline.stages.search.perplexity_rise", lambda *_: 0.5
    )  # a random model may gain by a cut
    assert search(tiny_model, texts, tmp_path / "none", "--max-loss=0.000001")[0] == 2
    assert "no cut meets --max-loss 1e-06: the best found removes" in capsys.readouterr().err


def test_two_segments_from_the_command_line(tiny_model, texts, tmp_path):
    _, found = search(tiny_model, texts, tmp_path / "two", "--ratio=0.4", "--num-segments=2")
    assert sum(stop - start for start, stop in found["segments"]) == 3


@pytest.mark.parametrize(
    ("count", "text", "flag"),
    [(100, "100 B", "100B"), (1234, "1.2 kB", "1.3kB"), (71234567, "71.2 MB", "71.3MB"), (2e9, "2.0 GB", "2GB")],
)
def test_sizes_are_readable_at_any_scale_and_a_flags_value_allows_what_was_asked(count, text, flag):
    assert files.size(count) == formatting.size(count) == text
    assert files.size_flag(count) == flag
    assert parse_bytes("--target-size", flag) >= count


@pytest.mark.parametrize(("target", "words"), [("100", "target size of 100 B:"), ("1TB", "is no cut")])
def test_a_size_that_no_cut_meets_is_refused_before_the_weights_are_loaded(
    target, words, tiny_model, texts, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("layercut.models.placement.load", lambda *_, **__: pytest.fail("the weights are loaded"))
    command = ["search", str(tiny_model), f"--data={texts[0]}", "--window=16", f"--out={tmp_path / 'run'}"]
    assert main([*command, f"--target-size={target}"]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "0.0 MB" not in said
    assert not (tmp_path / "run").exists()
    least = re.search(r"--target-size (\S+)\n", said)
    if target == "100":
        config = loading.load_config(checkpoints.resolve(str(tiny_model)))
        dense = loading.skeleton(config, torch.float32)
        layer = decoder_stack.find_decoder(dense).layers[0]
        one_left = decoder_stack.parameter_bytes(dense) - 7 * decoder_stack.parameter_bytes(layer)
        assert 0 <= parse_bytes("", least[1]) - one_left < 1000
