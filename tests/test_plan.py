"""The plan against what it foretells: real tiny models, their cuts, their caches and what the stages count."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
    T5Config,
)

import tiny
from layercut.cli.command_line import main
from layercut.config import (
    CompressConfig,
    DataConfig,
    EvaluateConfig,
    HealConfig,
    ModelConfig,
    PlanConfig,
    QuantizeConfig,
    SearchConfig,
)
from layercut.data.probes import ProbeRows
from layercut.estimate import GROUP, cut_parts, plan_run, sizes, stage_costs
from layercut.estimate.fits_in_memory import Device, judge
from layercut.estimate.machine import Rates
from layercut.estimate.shape import cache_kinds, count_parts, measure_shape, skeleton
from layercut.evaluation import speed
from layercut.export import checkpoint
from layercut.healing import tune_
from layercut.healing.endpoint_tuning import TuneSettings
from layercut.healing.least_squares import fold_systems, together
from layercut.healing.linear_outputs import find_targets
from layercut.healing.tuning_cost import tune_cost
from layercut.layer_search import search
from layercut.layer_search.search_cost import search_cost, unknown_search
from layercut.layer_search.sweep import DENSE, all_segments, streams_held
from layercut.models import checkpoints, decoder_stack, model_weights
from layercut.models.cost import Peak, PlannedRun, Work, total
from layercut.models.placement import spread_peak
from layercut.models.runner import DecoderRunner
from layercut.pipeline.stages.search import planned_search_tests, rows_of_tests
from layercut.quantization import quantize
from layercut.quantization.packing import saved_bytes
from layercut.quantization.quantization_cost import quantize_cost
from layercut.registries import criteria
from layercut.segments import Segment
from layercut.surgery import cut_segment_

WIDTHS = {
    "vocab_size": tiny.VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 6, "max_position_embeddings": 128,
}  # fmt: skip
FAMILIES: dict[str, Any] = {
    "llama-untied": LlamaConfig(**WIDTHS, tie_word_embeddings=False),
    "llama-tied": LlamaConfig(**WIDTHS, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**WIDTHS, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=tiny.VOCABULARY, n_embd=32, n_layer=6, n_head=4, n_positions=128),
    "mixtral": MixtralConfig(**WIDTHS, num_local_experts=4),
    "gemma2": Gemma2Config(**WIDTHS, head_dim=8, sliding_window=64),
}
CUT = [Segment(2, 4)]


def stock(name: str) -> Any:
    """A config of one's own: a cut changes the one that its model holds."""
    return copy.deepcopy(FAMILIES[name])


def config(method: str = "exhaustive", **changes: Any) -> CompressConfig:
    heal = {"tune_tokens": 64, "batch_tokens": 32} | changes
    return CompressConfig(
        text=DataConfig(tokens=8 * 16, window=16),
        search=SearchConfig(ratio=0.25, method=method),
        heal=HealConfig(**heal),
        evaluate=EvaluateConfig(eval_tokens=64),
    )


# --- sizes ---


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_bytes_and_cache_are_those_of_the_real_model_before_and_after_a_real_cut(name):
    model = tiny.tiny(stock(name))
    before = count_parts(skeleton(stock(name), torch.float32))
    segments, after = cut_parts(stock(name), torch.float32, CUT, 2)
    assert segments == CUT
    for parts in (before, after):
        assert parts.total == model_weights.parameter_count(model)
        assert sizes(parts, torch.float32)["saved"] == model_weights.parameter_bytes(model)
        layers = decoder_stack.find_decoder(model).layers
        assert parts.layers == [model_weights.parameter_count(layer) for layer in layers]
        assert parts.tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
        assert parts.embedding == model.get_input_embeddings().weight.numel()
        assert parts.head == (0 if parts.tied else model.get_output_embeddings().weight.numel())
        assert parts.kv_bytes_per_token == speed.cache_bytes(model) > 0
        if parts is before:
            cut_segment_(model, CUT)


def test_bytes_in_fewer_bits_count_a_scale_for_each_group_and_leave_the_rest():
    parts = count_parts(skeleton(stock("llama-untied"), torch.bfloat16))
    matrices = 6 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    assert parts.matrices == matrices
    rest = 2 * (parts.total - matrices)
    assert sizes(parts, torch.bfloat16)["4 bits"] == rest + matrices // 2 + 2 * matrices // GROUP
    assert sizes(parts, torch.bfloat16)["8 bits"] == rest + matrices + 2 * matrices // GROUP


def test_caches_are_told_apart():
    assert cache_kinds(stock("gemma2")) == {"sliding 64": 3, "full": 3}
    assert cache_kinds(stock("gpt2")) == {"full": 6}
    mixed = Qwen3NextConfig(num_hidden_layers=4)
    assert cache_kinds(mixed) == {"linear": 3, "full": 1}


# --- one layer ---


@pytest.mark.parametrize("name", ["llama-untied", "qwen2", "gpt2", "gemma2"])
def test_operations_of_a_layer_are_those_that_torch_counts_on_the_real_one(name):
    model = tiny.tiny(stock(name))
    model.set_attn_implementation("eager")  # the counter does not know the CPU's fused attention
    path = decoder_stack.find_decoder(model).path
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(1, 16, dtype=torch.long), use_cache=False)
    counted = counter.get_flop_counts()
    shape = measure_shape(stock(name), torch.float32, 16)
    for i, cost in enumerate(shape.costs):
        assert cost.flops == sum(counted[f"{type(model).__name__}.{path}.{i}"].values())
    assert shape.head_flops == 2 * 16 * 32 * tiny.VOCABULARY


def test_operations_of_experts_are_those_of_the_experts_that_a_token_takes():
    costs = measure_shape(stock("mixtral"), torch.bfloat16, 16).costs
    attention = 2 * 16 * (2 * 32 * 32 + 2 * 32 * 16) + 4 * 16 * 16 * 32
    experts = 2 * 16 * (2 * 3 * 32 * 64 + 4 * 32)  # two of four, and the router
    assert costs[0].flops == attention + experts
    wide = measure_shape(stock("mixtral"), torch.float32, 16).costs
    assert wide[0].flops == costs[0].flops
    assert wide[0].saved == 2 * costs[0].saved


@pytest.mark.parametrize("trained", [False, True])
def test_what_a_layer_keeps_for_its_backward_pass_is_what_autograd_keeps(trained):
    model = tiny.tiny(stock("llama-untied"))
    stack = DecoderRunner(model)
    hidden, calls = stack.enter(tiny.some_tokens(1, 16))
    hidden = hidden.detach().clone().requires_grad_(True)
    stack.layers[2].requires_grad_(trained)
    weights = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _ = stack.layer(2, hidden, calls)
    size = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in weights)
    cost = measure_shape(stock("llama-untied"), torch.float32, 16).costs[2]
    assert (cost.saved_trained if trained else cost.saved) == size
    assert cost.saved < cost.saved_trained


def test_layers_that_differ_are_measured_apart():
    mixed = Qwen3NextConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=4, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, linear_num_value_heads=4, linear_num_key_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8,
    )  # fmt: skip
    costs = measure_shape(mixed, torch.bfloat16, 16).costs
    assert costs[0] == costs[1] != costs[3]


# --- what the stages count ---


@pytest.fixture(scope="module")
def llama() -> tuple[DecoderRunner, Any, torch.Tensor]:
    model = tiny.llama(12)
    return DecoderRunner(model), measure_shape(model.config, torch.float32, 16), tiny.some_tokens(40, 16)


def run_of(shape: Any, settings: CompressConfig, segment: Segment) -> PlannedRun:
    return PlannedRun(
        config=settings, shape=shape, reported=shape, tuned=shape, segments=[segment], after=shape.dense, heldout=64,
        folded=8, libraries=7,
    )  # fmt: skip


def told(method: str, shape: Any, length: int, rows: int) -> Work:
    settings = replace(config(method), text=DataConfig(tokens=16 * rows, window=16))
    found = search_cost(run_of(shape, settings, Segment(0, length))).work
    assert found is not None
    return found


@pytest.mark.parametrize("method", ["exhaustive", "cosine", "perplexity", "taylor", "sleb"])
@pytest.mark.parametrize("rows", [3, 9])
def test_layer_forwards_are_those_that_the_search_counts(llama, method, rows):
    stack, shape, tokens = llama
    cost = search(stack, tokens[:rows], n_layers=3, method=method, seed=0).cost
    planned = told(method, shape, 3, rows)
    # a baseline's pick is priced as well, which is not in its own cost
    extra = 0 if method == "exhaustive" else told("random", shape, 3, rows).layer_forwards.least
    assert planned.layer_forwards.least - extra == cost.layer_forwards
    assert planned.layer_backwards.expected == cost.layer_backwards
    if method == "exhaustive":
        assert planned.layer_forwards.expected == planned.layer_forwards.most == cost.layer_forwards


@pytest.mark.parametrize("method", ["fisher", "race"])
@pytest.mark.parametrize(("length", "rows"), [(2, 3), (3, 40), (9, 12), (11, 6)])
def test_the_layer_forwards_of_a_race_lie_within_their_bounds(llama, length, rows, method):
    stack, shape, tokens = llama
    planned = told(method, shape, length, rows)
    for seed in (0, 1):
        cost = search(stack, tokens[:rows], n_layers=length, method=method, seed=seed).cost
        for counted, bounds in (
            (cost.layer_forwards, planned.layer_forwards), (cost.layer_backwards, planned.layer_backwards)
        ):  # fmt: skip
            assert bounds.least <= counted <= bounds.most
            assert bounds.least <= bounds.expected <= bounds.most
        assert planned.layer_forwards.most < 3 * cost.layer_forwards, "bounds that wide say nothing"


@pytest.mark.parametrize(("length", "rows"), [(2, 12), (4, 24)])
def test_one_segment_compared_with_two_on_tests_as_well_lies_within_its_bounds(llama, length, rows):
    stack, shape, tokens = llama
    answers = torch.full((8, 16), -1)
    answers[:, 9] = torch.arange(8)
    tests = ProbeRows(tokens[:8].clone(), answers, torch.zeros(8, dtype=torch.int64), ("recall",), torch.full((8,), 16))
    settings = replace(config("fisher"), text=DataConfig(tokens=16 * rows, window=16))
    planned = search_cost(replace(run_of(shape, settings, Segment(0, length)), tests=8)).work.layer_forwards
    alone = search_cost(run_of(shape, settings, Segment(0, length))).work.layer_forwards
    cost = search(stack, tokens[:rows], n_layers=length, probes=tests, num_segments="auto", seed=0).cost
    assert planned.least <= cost.layer_forwards <= planned.most
    assert planned.expected / 3 < cost.layer_forwards < 3 * planned.expected
    assert cost.layer_forwards > alone.most, "as a search on the text alone was planned"


def test_a_plan_counts_the_tests_and_what_judges_them(bare, capsys):
    words = ["plan", str(bare), "--ratio=0.3", "--no-calibrate", "--window=64", "--tokens=1024", "--json"]
    plans = []
    for preserve in ("all", "none"):
        assert main([*words, f"--preserve={preserve}"]) == 0
        plans.append(json.loads(capsys.readouterr().out)["stages"])
    for stage in ("search", "eval"):
        with_tests, without = (plan[stage]["layer_forwards"]["expected"] for plan in plans)
        assert with_tests > 1.5 * without
    assert planned_search_tests(CompressConfig(search=SearchConfig(ratio=0.3))) == rows_of_tests(DataConfig()) == 16
    assert planned_search_tests(CompressConfig(search=SearchConfig(ratio=0.3, method="cosine"))) == 0


@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "gpt2", "mixtral", "qwen3"])
def test_the_systems_that_are_counted_are_those_that_the_fold_solves(name):
    config = Qwen3Config(**WIDTHS, head_dim=16) if name == "qwen3" else FAMILIES[name]
    targets = find_targets(DecoderRunner(tiny.tiny(config)), 2, tiny.some_tokens(2))
    solved = [sum(target.width for target in together(targets[number:])) for number in range(len(targets))]
    assert list(fold_systems(measure_shape(config, torch.float32, 16))) == solved


def tuned(shape: Any, segment: Segment, *, on_disk: bool = False, **changes: Any) -> Peak:
    stream = "on" if on_disk else "off"
    run = run_of(shape, replace(config(), load=ModelConfig(stream=stream)), segment)
    return tune_cost(run, TuneSettings(**{"batch_tokens": 32} | changes)).peak


def test_writing_chats_is_planned_with_tuning(llama):
    shape = llama[1]

    def steps(share: float, tokens: int, stream: str = "off") -> float:
        heal, load = HealConfig(tune_tokens=tokens, chat_share=share), ModelConfig(stream=stream)
        found = stage_costs(run_of(shape, replace(config(), heal=heal, load=load), Segment(2, 4)))["tune"].work
        assert found is not None
        return found.decoded_layers / shape.layers

    assert steps(0.0, 160 * 16) == steps(0.5, 160 * 16, "on") == 0
    assert steps(0.1, 160 * 16) == 16 + 16  # sixteen chats of as many tokens in one batch, and seven that are held out
    assert steps(0.5, 160 * 16) == 3 * 16 + 16


def test_the_cache_of_chats_being_written_counts_where_it_is_larger_than_tuning(llama):
    a_megabyte = replace(llama[1], dense=replace(llama[1].dense, kv_bytes_per_token=10**6))

    def peak(share: float, shape: Any = a_megabyte) -> Peak:
        heal = HealConfig(tune_tokens=160 * 16, chat_share=share)
        return stage_costs(run_of(shape, replace(config(), heal=heal), Segment(2, 4)))["tune"].peak

    assert peak(0.1)["cache"] == 16 * 16 * 10**6
    assert peak(0.5)["cache"] == 32 * 16 * 10**6  # as many rows as are written at once
    assert peak(0.0) == peak(0.1, llama[1])


@pytest.mark.parametrize("radius", [1, 2])
def test_the_state_of_tuning_is_what_tuning_reports(llama, radius):
    dense, shape, tokens = llama
    student = DecoderRunner(model_weights.share(dense.model))
    cut_segment_(student.model, [Segment(4, 7)])
    student = DecoderRunner(student.model)
    report = tune_(student, dense, tokens[:2], heldout=tokens[2:4], batch_tokens=32, radius=radius)
    planned = tuned(shape, Segment(4, 7), radius=radius)
    # the masters' state in float32, and the parameters themselves, their gradients and their best values
    assert planned["trained state"] == report.state_bytes + 3 * 4 * report.trained_parameters


def test_the_more_is_done_at_once_the_more_memory_it_takes(llama):
    _, shape, _ = llama
    segment = Segment(4, 7)
    peak = total(tuned(shape, segment))
    assert total(tuned(shape, segment, batch_tokens=64)) > peak
    assert total(tuned(shape, segment, radius=2)) > peak
    early, late = (tuned(shape, Segment(s, s + 3))["kept for backward"] for s in (1, 8))
    assert early > late


def test_layers_on_disk_take_two_of_them_and_hidden_states_of_all_rows(llama):
    _, shape, _ = llama
    on_disk = replace(config(), load=ModelConfig(stream="on"))
    rest = shape.dense.total - sum(shape.dense.layers)
    runs = (run_of(shape, settings, Segment(2, 5)) for settings in (on_disk, config()))
    peaks, in_memory = ({name: spent.peak for name, spent in stage_costs(run).items()} for run in runs)
    assert peaks.keys() == in_memory.keys()
    for peak in peaks.values():
        assert peak["weights in memory"] + peak["two layers"] == 4 * (rest + 2 * shape.dense.layers[0])
    token = shape.hidden * 4
    sets = [DENSE, *((segment,) for segment in all_segments(3, 12))]
    assert peaks["search"]["streams"] == streams_held(sets, 12) * 8 * 16 * token
    assert peaks["eval"]["streams"] == 2 * 64 * token
    assert peaks["tune"]["trained state"] == in_memory["tune"]["trained state"]
    # of the layers from the one before the cut on, the input of 32 tokens each, and two more states
    assert peaks["tune"]["inputs of a step"] == (9 - 1 + 2) * 32 * token
    assert "logits or layer" in tuned(shape, Segment(4, 7), on_disk=True)


def test_time_is_work_over_rates(llama):
    _, shape, _ = llama
    rates = Rates(flops=10.0, flops64=5.0, matvec=4.0, launch=0.0, memory=2.0, disk=None)
    spent = Work(flops=20, flops64=5, moved_bytes=4, decoded_bytes=8, read_bytes=2)
    assert rates.seconds(shape, spent) == 20 / 10 + 5 / 5 + 4 / 2 + 8 / 4 + 2 / 2


# --- what fits ---


def needs(settings: CompressConfig, target: Device) -> dict[str, int]:
    layers = 4 if settings.heal.radius != 1 else 1
    return {"fold": 100 + layers * settings.text.window, "tune": 100 + settings.heal.batch_tokens}


def test_flags_are_named_until_it_fits():
    roomy, tight, tiny_one, none = (Device("x", size, accelerator=False) for size in (200, 120, 110, 90))
    start = CompressConfig(
        text=DataConfig(window=16), search=SearchConfig(ratio=0.2), heal=HealConfig(batch_tokens=64, radius=2)
    )
    assert judge(roomy, start, needs, 50)["flags"] == []
    found = judge(tight, start, needs, 50)
    assert not found["fits"]
    assert (found["stage"], found["needs_bytes"]) == ("fold", 164)
    assert found["flags"] == ["--batch-tokens 1", "--radius 1"]
    assert judge(tiny_one, start, needs, 50)["flags"] is None, "no flag makes the window smaller than it is useful"
    assert "weights alone" in judge(none, start, needs, 95)["why"]

    def from_disk(settings: CompressConfig, target: Device) -> dict[str, int]:
        return {"tune": 10 if settings.load.stream == "on" else 500}

    assert judge(none, start, from_disk, 95)["flags"] == ["--stream on"]


def test_several_devices_share_what_one_cannot_hold():
    def of(weights: int) -> Callable[[CompressConfig, Device], dict[str, int]]:
        def needs(settings: CompressConfig, target: Device) -> dict[str, int]:
            return {"tune": weights // (target.devices if target.spread else 1) + settings.heal.batch_tokens}

        return needs

    four = Device("x", 150, devices=4, accelerator=False)
    config = CompressConfig(search=SearchConfig(ratio=0.2), heal=HealConfig(batch_tokens=64))
    found = judge(four, config, of(400), 400)
    assert (found["devices_used"], found["needs_bytes"], found["fits"]) == (4, 164, False)
    assert found["flags"][0].startswith("--batch-tokens")
    assert judge(four, config, of(100), 100)["devices_used"] == 1, "the weights fit one"
    assert judge(four, config, of(800), 800)["why"] == "the weights alone are larger than the device"


def test_a_stage_over_spread_weights():
    shape = measure_shape(stock("llama-untied"), torch.bfloat16, 16)
    layer = max(shape.dense.layers)
    peak = {"weights": 2 * shape.dense.total, "trained state": 800, "logits": 7}
    parts = spread_peak(peak, shape, 8)
    assert (parts["weights"], parts["trained state"], parts["logits"]) == (2 * shape.dense.total // 8, 100, 7)
    assert parts["gathered"] >= 2 * 2 * layer
    assert parts["gradient of a layer"] == 6 * layer
    assert "gradient of a layer" not in spread_peak({"weights": 7}, shape, 8)


def test_over_spread_weights_no_cuts_are_tried(monkeypatch, tmp_path):
    """As no run does it: their healing is in the search's memory on one device alone."""
    stock("qwen2").save_pretrained(tmp_path)
    place = Device("x", 10**9, devices=2, accelerator=False)
    monkeypatch.setattr("layercut.estimate.targets", lambda memory: [place, replace(place, spread=True)])
    monkeypatch.setattr("layercut.estimate.judge", lambda target, config, needs, weights: needs(config, target))
    text, found = DataConfig(window=64, tokens=1024), {}
    for score in ("healed", "raw"):
        asked = PlanConfig(search=SearchConfig(ratio=0.3, score=score), text=text, calibrate=False)
        plan = plan_run(str(tmp_path), asked)
        found[score] = [each["search"] - plan["base_bytes"] for each in plan["fits"]]
    assert found["healed"][0] > found["raw"][0]
    assert found["healed"][1] == found["raw"][1]


# --- the command ---


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder that holds a config and nothing else."""
    folder = tmp_path / "bare"
    stock("qwen2").save_pretrained(folder)
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    return folder


def test_a_config_alone_is_enough_and_nothing_is_fetched(bare, monkeypatch, capsys):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("went to the network"))
    assert main(["plan", str(bare), "--ratio=0.3", "--no-calibrate", "--window=16", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["layers"] == {"before": 6, "after": 4}
    assert plan["segments"] == [[2, 4]]
    assert plan["parameters"]["after"]["total"] == cut_parts(stock("qwen2"), torch.float32, CUT, 2)[1].total
    assert plan["seconds"] is plan["machine"] is None
    assert set(plan["stages"]) == {"load", "search", "fold", "tune", "eval", "export"}
    for name, stage in plan["stages"].items():
        assert stage["seconds"] is None
        assert stage["peak_bytes"] == sum(stage["parts"].values())
        assert name == "load" or stage["parts"]["weights"] == plan["bytes"]["before"]["saved"]
    assert [fit["fits"] for fit in plan["fits"][-2:]] == [True, True]


def test_tables_and_a_calibration(bare, capsys):
    assert main(["plan", str(bare), "--segment=1:3", "--window=16", "--tokens=64", "--tune-tokens=0"]) == 0
    words = capsys.readouterr().out
    assert "segment 1:3 (given)" in words
    assert "tied to the embedding" in words
    assert "tune" not in words, "nothing is tuned"
    assert "8 x 80 GB GPUs" in words


def test_the_search_by_a_criterion_of_ones_own_is_planned_as_unknown(bare, monkeypatch, capsys):
    monkeypatch.setitem(criteria.registered, "test-mine", lambda runner, tokens, length: [])
    words = ["plan", str(bare), "--ratio=0.3", "--no-calibrate", "--window=16", "--method=test-mine"]
    assert main([*words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["stages"]["search"]["flops"] is plan["stages"]["search"]["layer_forwards"] is None
    assert main(words) == 0
    assert "What the criterion 'test-mine' computes and holds is unknown" in capsys.readouterr().out
    for name in criteria:
        assert (unknown_search(SearchConfig(ratio=0.3, method=name)) is None) == (name in criteria.own)


def test_the_fresh_process_generates_as_many_tokens_as_are_counted():
    source = Path(checkpoint.CHECKER).read_text()
    assert f"NEW_TOKENS = {checkpoint.PROBE_TOKENS}\n" in source


@pytest.mark.parametrize("quantizer", ["gptq", "rtn"])
def test_layer_forwards_of_quantization_are_those_that_it_runs(llama, quantizer, monkeypatch):
    stack, shape, tokens = llama
    run = run_of(shape, replace(config(), quantize=QuantizeConfig(bits=4, quantizer=quantizer)), Segment(2, 4))
    run = replace(run, rounding_tests=2)
    rows = 0
    layer = DecoderRunner.plain_layer  # what calibration runs, and the runner's check of the model does not

    def counted(self: Any, i: int, hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        nonlocal rows
        rows += len(hidden)
        return layer(self, i, hidden, *rest)

    monkeypatch.setattr(DecoderRunner, "plain_layer", counted)
    kind = type(stack.model.model.layers[0])
    whole, passes = kind.forward, list[int]()

    def watched(self: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        passes.extend([len(hidden)] if torch.is_grad_enabled() else [])  # for what each token counts
        return whole(self, hidden, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", watched)
    quantize(stack.model, tokens[:10], bits=4, quantizer=quantizer)
    work = quantize_cost(run, calibrated=quantizer == "gptq").work
    assert work is not None
    assert work.layer_forwards.expected == rows + sum(passes)
    assert work.layer_backwards.expected == sum(passes)
    assert bool(passes) is (quantizer == "gptq")


def test_a_plan_counts_quantization_and_what_is_trained_after_it(bare, capsys):
    common = ["plan", str(bare), "--no-calibrate", "--json", "--tune-tokens=64"]

    def stages(*flags: str, window: int = 16) -> dict[str, Any]:
        assert main([*common, f"--window={window}", f"--tokens={8 * window}", *flags]) == 0
        return json.loads(capsys.readouterr().out)["stages"]

    plain = ["--bits=4", "--tune-quantized=none"]
    assert "quantize" not in stages("--ratio=0.2")
    rounded, trained = (stages("--ratio=0.2", *flags)["quantize"] for flags in (plain, ["--bits=4"]))
    assert trained["layer_backwards"]["expected"] > rounded["layer_backwards"]["expected"] > 0, "what tokens count"
    tests, none = (
        stages("--ratio=0.2", *plain, *more, window=64)["quantize"]["layer_backwards"]["expected"]
        for more in ([], ["--preserve=none"])
    )
    assert 4 * tests == 5 * none, "a row of tests for four of text"
    nearest = stages("--ratio=0.2", *plain, "--quantizer=rtn")["quantize"]
    assert nearest["layer_backwards"]["expected"] == 0
    assert trained["flops"] > rounded["flops"] > 0
    learned = stages("--ratio=0.2", "--bits=4", "--tune-quantized=rounding")["quantize"]
    assert learned["parts"]["trained state"] > 10 * trained["parts"]["trained state"]
    auto = ["--bits=auto", "--target-size=60kB", "--tune-quantized=none"]
    chosen = stages("--ratio=0", *auto)
    assert not {"search", "fold", "tune"} & chosen.keys(), "nothing is removed"
    assert chosen["quantize"]["layer_backwards"]["expected"] > 0
    assert main(["plan", str(bare), "--no-calibrate", "--window=16", "--ratio=0", *auto]) == 0
    assert "no layer is removed" in capsys.readouterr().out
    assert main([*common, "--window=16", "--ratio=0", "--bits=auto", "--target-size=1kB"]) == 2
    assert "the least possible is" in capsys.readouterr().err


def test_a_plan_tells_the_size_in_the_bits_that_are_asked_for(bare, capsys):
    common = ["plan", str(bare), "--no-calibrate", "--tokens=128", "--window=16", "--tune-tokens=64", "--ratio=0.25"]
    asked = ["--bits=3", "--embedding-bits=3", "--group-size=16"]
    assert main([*common, *asked, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    dtype = getattr(torch, told["dtype"])
    config = QuantizeConfig(bits=3, embedding_bits=3, group_size=16)
    whole = saved_bytes(skeleton(stock("qwen2"), dtype), config, dtype)
    ((start, stop),) = told["segments"]
    gone = sum(whole.layers[start:stop])
    assert told["bytes"]["before"]["asked"] == whole.total
    assert told["bytes"]["after"]["asked"] == whole.total - gone
    assert main([*common, *asked]) == 0
    assert "as asked" in capsys.readouterr().out
    assert main([*common, "--json"]) == 0
    assert "asked" not in json.loads(capsys.readouterr().out)["bytes"]["before"], "nothing is rounded"


def test_of_a_hub_model_only_the_config_is_fetched(bare, monkeypatch):
    fetched = []

    def download(name: str, file: str, **_: Any) -> str:
        fetched.append((name, file))
        return str(bare / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("fetched everything"))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None)
    assert checkpoints.resolve("owner/name", weights=False).folder == bare
    assert fetched == [("owner/name", "config.json")]


NOT_PLANNED = ("run", "tasks", "long", "hub")
"""Settings that take nothing, take as often again what the search takes, save what was measured on one machine alone,
or say where the result goes."""


def test_every_setting_of_compress_can_be_planned_and_has_its_default():
    ours, theirs = (asdict(cls()) for cls in (PlanConfig, CompressConfig))
    for name in NOT_PLANNED:
        del theirs[name]
    assert {key: ours[key] for key in theirs} == theirs


def test_an_export_that_does_not_fit_twice_does_with_less(tmp_path, capsys):
    deep = stock("llama-untied")
    deep.num_hidden_layers = 24
    deep.save_pretrained(tmp_path)
    argv = ["plan", str(tmp_path), "--ratio=0.3", "--window=16", "--no-calibrate"]
    assert main([*argv, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    export, layer = plan["stages"]["export"], plan["parameters"]["before"]["layers"][0]
    rest = plan["parameters"]["before"]["total"] - 24 * layer
    number = export["parts"]["weights"] // plan["parameters"]["before"]["total"]
    saved = export["peak_bytes"] - export["least_bytes"]
    assert saved == (number + 4) * plan["parameters"]["after"]["total"] - number * (rest + 2 * layer)
    here = next(fit for fit in plan["fits"] if fit["target"] == "this machine's CPU")
    assert (here["stage"], here["needs_bytes"]) == ("export", export["least_bytes"]), "two Pythons are most of it"
    assert main(argv) == 0
    assert "the export is verified from disk" in " ".join(capsys.readouterr().out.split())


def test_work_that_cannot_be_told_is_null(bare):
    settings = PlanConfig(
        search=SearchConfig(ratio=0.3, method="evolution"), text=DataConfig(tokens=64, window=16), calibrate=False
    )
    assert plan_run(str(bare), settings)["stages"]["search"]["flops"] is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "neither --ratio nor --segment"),
        (["--ratio=0.01"], "is 0 layers"),
        (["--segment=4:9"], "reaches beyond"),
        (["--ratio=0.3", "--window=4096"], "longer than the model's 128 positions"),
        (["--ratio=0.3", "--dtype=float8"], "float8"),
        (["--ratio=0.3", "--stream=on", "--bits=4"], "--bits needs the model in memory"),
        (["--ratio=0.3", "--for=vllm", "--bits=3"], "vLLM"),
        (["--ratio=0.3", "--preserve=nonsense"], "no capability is called 'nonsense'"),
    ],
)
def test_settings_that_a_run_would_refuse_are_refused(bare, capsys, flags, words):
    usual = [] if "--window" in str(flags) else ["--window=16"]
    assert main(["plan", str(bare), "--no-calibrate", *usual, *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert "hint: " in captured.err


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (None, "config.json"),
        (BertConfig(architectures=["BertForMaskedLM"]), "not a causal language model"),
        (T5Config(), "encoder-decoder"),
    ],
)
def test_what_is_no_causal_model_is_refused(tmp_path, capsys, other, words):
    folder = tmp_path / "other"
    folder.mkdir()
    if other is not None:
        other.save_pretrained(folder)
    assert main(["plan", str(folder), "--ratio=0.3", "--no-calibrate"]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert "hint: " in captured.err


def test_nothing_there_is_refused(tmp_path, capsys):
    assert main(["plan", str(tmp_path / "missing.gguf"), "--ratio=0.3"]) == 2
    assert main(["plan", "./nowhere", "--ratio=0.3"]) == 2
    assert capsys.readouterr().err.count("hint: ") == 2


def test_evaluation_is_told_for_the_window_that_it_reports_on(bare, capsys):
    """One window is the least, however few tokens are asked for; the stages before know nothing of it."""
    plans = []
    flags = ["--ratio=0.25", "--window=16", "--eval-tokens=16", "--no-calibrate", "--json"]
    for window in (16, 128):
        assert main(["plan", str(bare), *flags, f"--eval-window={window}"]) == 0
        stages = json.loads(capsys.readouterr().out)["stages"]
        plans.append({name: stage["parts"] for name, stage in stages.items()})
    assert plans[1]["eval"]["logits or layer"] > plans[0]["eval"]["logits or layer"]
    searches = [{**plan["search"], "python and libraries": 0} for plan in plans]
    assert searches[0] == searches[1]
