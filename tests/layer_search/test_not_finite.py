"""What is not a finite number is the worst there is: no search, fold or tuning prefers it, and no file loses it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

import tiny
from layercut.config import SearchConfig
from layercut.config.commands import CompressConfig
from layercut.errors import ConfigError, ModelError
from layercut.healing import tune_
from layercut.healing.least_squares import fold_cut_
from layercut.healing.normal_equations import Normal
from layercut.layer_search import SearchResult, longest_within, perplexity_rise, search
from layercut.layer_search.result import Candidate, Cost
from layercut.layer_search.sweep import set_losses
from layercut.models import decoder_stack
from layercut.models.losses import as_cost, mean_kl
from layercut.models.runner import DecoderRunner
from layercut.pipeline.run_folder import Run
from layercut.pipeline.stages.size_budgets import FrontierRecord, out_of_budget
from layercut.registries import criteria
from layercut.report.stage_lines import describe_fold, describe_point
from layercut.segments import Segment
from layercut.surgery import cut_segment_

BAD = Segment(3, 4)
"""Of `overflowing`, what must not be cut."""


def overflowing() -> Any:
    """A sound float16 model: a channel goes to 40,000 in layer 2, to 0 in 3, to 40,000 in 4, to 0 in 5. Without layer 3
    it would be 80,000, which float16 does not hold; without any other layer it is finite."""
    sizes = {"vocab_size": tiny.VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    config = LlamaConfig(**sizes, **heads, mlp_bias=True, initializer_range=0.15, tie_word_embeddings=False)
    model = tiny.tiny(config)
    for i, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.bias.zero_()
        layer.mlp.down_proj.bias[0] = {2: 4e4, 3: -4e4, 4: 4e4, 5: -4e4}.get(i, 0.0)
    return model.half()


@pytest.fixture(scope="module")
def sound() -> Any:
    return overflowing()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_the_worst_cost(value):
    assert as_cost(value) == as_cost(value, 0.0) == math.inf
    assert (as_cost(-1e-9, 0.0), as_cost(-1.0), as_cost(2.0)) == (0.0, -1.0, 2.0)


LOOK = {"fisher", "race", "exhaustive", "perplexity", "sleb", "evolution"}
"""Methods that run the cut model; the others choose by the dense one, and what they choose is measured."""


@pytest.mark.parametrize("method", [name for name in criteria if name != "auto"])
def test_no_method_takes_a_cut_that_overflows_for_a_free_one(sound, method):
    stack, tokens = DecoderRunner(sound), tiny.some_tokens(4, 8)
    seeds = range(8) if method == "random" else [0]
    for seed in seeds:
        result = search(stack, tokens, n_layers=1, method=method, seed=seed)
        assert result.segments != [BAD] or method not in LOOK
        for candidate in result.candidates:
            costs = [candidate.kl, *([] if candidate.score is None else [candidate.score])]
            assert all(math.isinf(found) == (candidate.segments == (BAD,)) for found in costs)
        if result.segments == [BAD]:
            break
    assert method != "random" or result.segments == [BAD], "drawn once, and not as free"


def test_two_segments_avoid_it_too(sound):
    result = search(DecoderRunner(sound), tiny.some_tokens(2, 8), n_layers=2, method="fisher", seed=0, num_segments=2)
    assert result.candidates[0].segments != (BAD,)
    assert math.isfinite(result.candidates[0].kl)


def test_losses_and_budgets_know_it(sound):
    stack, tokens = DecoderRunner(sound), tiny.some_tokens(2, 8)
    assert set_losses(stack, tokens, [(BAD,)], Cost()) == {(BAD,): math.inf}
    assert perplexity_rise(stack, tokens, (BAD,)) == math.inf
    found = SearchResult("given", [Candidate((BAD,), math.inf)], Cost())
    with pytest.raises(ConfigError, match="no cut meets --max-loss") as caught:
        longest_within(0.1, [1], lambda length: found, lambda cuts: math.inf)
    assert "inf" not in caught.value.hint


def without_bad(model: Any) -> Any:
    student = decoder_stack.share(model)
    cut_segment_(student, [BAD])
    return student


def test_a_fold_is_judged_by_finite_figures_only(sound):
    dense, tokens = DecoderRunner(sound), tiny.some_tokens(8, 8)
    student = DecoderRunner(without_bad(sound))
    assert mean_kl(dense, student, tokens) == math.inf
    sums = Normal.zeros(2, 2, torch.device("cpu"))
    sums.add_(torch.ones(1, 2), torch.full((1, 2), math.nan))
    assert sums.left(torch.zeros(2, 2).double()) == math.inf
    assert not sums.finite
    ruined = decoder_stack.share(sound)
    ruined.model.layers[1].mlp.down_proj.bias = torch.nn.Parameter(torch.full((32,), 6e4).half(), requires_grad=False)
    cut_segment_(ruined, [BAD])
    fold = fold_cut_(DecoderRunner(ruined), dense, BAD, tokens)
    assert fold.skipped == "what reaches the cut is not finite"


def test_tuning_keeps_the_first_finite_state(monkeypatch):
    """The start cannot be scored: any state that can is better, and one that again cannot is not kept."""
    scores = iter([math.nan, 2.0, math.nan, *[1.5] * 20])
    monkeypatch.setattr("layercut.healing.tuning_pass.HeldOut.score", lambda self: {"loss": next(scores)})
    model = tiny.llama(4)
    student = decoder_stack.share(model)
    cut_segment_(student, [Segment(1, 2)])
    heldout = tiny.some_tokens(2, 16, 1)
    report = tune_(student, model, tiny.some_tokens(4, 16), heldout=heldout, batch_tokens=16, learning_rate=1e-3)
    assert [point["loss"] for point in report.heldout] == [math.inf, 2.0, math.inf, 1.5, 1.5]
    assert report.best_step == 3
    assert report.best == 1.5
    assert report.setbacks == [2], "it went back to the state of step 1"


def test_dense_predictions_that_are_not_finite_are_refused_and_the_layer_is_named(sound):
    tokens = tiny.some_tokens(2, 8)
    for method in list(criteria):
        with pytest.raises(ModelError, match=r"layer 3 is the first of 7.*no weight holds NaN") as caught:
            search(DecoderRunner(without_bad(sound)), tokens, n_layers=1, method=method, seed=0)
        assert "--dtype" in caught.value.hint


def test_tuning_refuses_such_a_teacher_too(sound):
    dense, tokens = without_bad(sound), tiny.some_tokens(2, 8)
    student = decoder_stack.share(dense)
    cut_segment_(student, [Segment(1, 2)])
    with pytest.raises(ModelError, match="layer 3 is the first of 7"):
        tune_(student, dense, tokens, heldout=tokens)


def test_weights_that_hold_nan_are_named():
    model = tiny.llama(4)
    model.model.layers[2].mlp.down_proj.weight[3, 3] = math.nan
    with pytest.raises(ModelError, match=r"model\.layers\.2\.mlp\.down_proj\.weight holds NaN or Inf"):
        search(DecoderRunner(model), tiny.some_tokens(2, 8), n_layers=1, method="exhaustive", seed=0)
    with pytest.raises(ModelError, match=r"down_proj\.weight holds NaN or Inf"):
        mean_kl(DecoderRunner(model), DecoderRunner(without_bad(model)), tiny.some_tokens(2, 8))


# --- files: what is not finite is written as strict JSON and read back as a number ---


@dataclass(frozen=True, kw_only=True)
class Figures:
    rise: float = math.inf
    curve: tuple[dict[str, float], ...] = ({"loss": math.nan}, {"loss": 1.5})
    low: float = -math.inf
    word: str = "infinite"
    pair: tuple[int, int] = (1, 2)


def test_a_stage_returns_the_same_figures_whenever_it_is_asked(tmp_path):
    def refuse(word: str) -> Any:
        raise AssertionError(f"{word} is no JSON")

    computed: list[Figures] = []
    found = []
    for _ in range(2):
        with Run(tmp_path / "run") as run:
            run.describe({})
            with run.stage(Figures, "figures", "inputs") as stage:
                if stage.open:
                    stage.found = Figures()
                    computed.append(stage.found)
            found.append(stage.artefact)
    assert len(computed) == 1
    # repr: NaN is not equal to itself
    assert repr(found[0]) == repr(found[1])
    assert found[0].rise == math.inf
    assert found[0].low == -math.inf
    assert math.isnan(found[0].curve[0]["loss"])
    assert (found[0].word, found[0].pair) == ("infinite", (1, 2))
    json.loads((tmp_path / "run" / "figures.json").read_text(), parse_constant=refuse)
    json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1], parse_constant=refuse)


def test_what_is_said_and_decided_takes_figures_that_are_not_finite():
    fold = {"segment": [3, 4], "skipped": None, "layer": 2, "modules": ["mlp.down_proj"], "kept": True}
    assert "inf -> 2.5000, kept" in describe_fold(fold | {"kl_before": math.inf, "kl_after": 2.5})
    point = FrontierRecord(layers=7, bits=4, bytes=2_000_000, rise=math.inf)
    assert describe_point(vars(point)) == "7 layers at 4 bits: 2.0 MB, perplexity not finite"
    both = CompressConfig(search=SearchConfig(max_loss=0.1, target_size="3MB"))
    assert "inf" not in out_of_budget([point], both).hint
