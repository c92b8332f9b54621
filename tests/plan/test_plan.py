"""The plan against what it estimates: real tiny models, their cuts, their caches and what the stages count."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, Gemma2Config, GPT2Config, LlamaConfig, MixtralConfig, Qwen2Config, Qwen3NextConfig

import tiny
from layercut.cli.command_line import main
from layercut.config import DataConfig, EvaluateConfig, HealConfig, ModelConfig, QuantizeConfig, SearchConfig
from layercut.config.commands import CompressConfig, PlanConfig, from_flat
from layercut.errors import LayercutError
from layercut.evaluation import speed
from layercut.healing import tune_
from layercut.healing.linear_outputs import find_targets
from layercut.layer_search import search
from layercut.models import checkpoints, decoder_stack, loading
from layercut.models.memory import Budget
from layercut.models.runner import DecoderRunner
from layercut.pipeline.resolve_options import resolve
from layercut.plan import Place, Planner, plan_run, pruned_parts, savings, shares, sizes, what_folds
from layercut.plan.costs import Planned, Stage, Work, stages
from layercut.plan.rates import Rates, real_layer
from layercut.plan.shape import count_parts, measure_shape
from layercut.registries import criteria
from layercut.segments import Segment
from layercut.surgery import cut_segment_

WIDTHS = {
    "vocab_size": tiny.VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 6, "max_position_embeddings": 128,
}  # fmt: skip
FAMILIES: dict[str, Any] = {
    "llama-untied": LlamaConfig(**WIDTHS, tie_word_embeddings=False),
    "qwen2-tied": Qwen2Config(**WIDTHS, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=tiny.VOCABULARY, n_embd=32, n_layer=6, n_head=4, n_positions=128),
    "mixtral": MixtralConfig(**WIDTHS, num_local_experts=4),
    "gemma2": Gemma2Config(**WIDTHS, head_dim=8, sliding_window=64),
}
CUT = [Segment(2, 4)]


def stock(name: str) -> Any:
    """A config of one's own: a cut changes the one that its model holds."""
    return copy.deepcopy(FAMILIES[name])


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder that holds a config and nothing else."""
    stock("qwen2-tied").save_pretrained(tmp_path / "bare")
    return tmp_path / "bare"


def planned(capsys: pytest.CaptureFixture[str], folder: Path, *flags: str) -> dict[str, Any]:
    """What the command prints as JSON, of a short run."""
    window = [] if "--window" in str(flags) else ["--window=16", "--tokens=128"]
    assert main(["plan", str(folder), *window, "--tune-tokens=64", "--no-calibrate", "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


# --- the model ---


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_bytes_and_cache_are_those_of_the_real_model_before_and_after_a_real_cut(name):
    model = tiny.tiny(stock(name))
    before = count_parts(loading.skeleton(stock(name), torch.float32))
    segments, after = pruned_parts(stock(name), torch.float32, CUT, 2)
    assert segments == CUT
    for parts in (before, after):
        assert parts.total == decoder_stack.parameter_count(model)
        assert sizes(parts, torch.float32)["saved"] == decoder_stack.parameter_bytes(model)
        layers = decoder_stack.find_decoder(model).layers
        assert parts.layers == [decoder_stack.parameter_count(layer) for layer in layers]
        assert parts.head == (0 if parts.tied else model.get_output_embeddings().weight.numel())
        assert parts.kv_bytes_per_token == speed.cache_bytes(model) > 0
        packed = sizes(parts, torch.float32)["4 bits"]
        assert packed == 4 * (parts.total - parts.matrices) + parts.matrices // 2 + 2 * parts.matrices // 128
        if parts is before:
            cut_segment_(model, CUT)
    assert after.caches == ({"sliding 64": 2, "full": 2} if name == "gemma2" else {"full": 4})


@pytest.mark.parametrize("name", ["llama-untied", "gpt2", "gemma2"])
def test_operations_of_a_layer_are_those_that_torch_counts_on_the_real_one(name):
    model = tiny.tiny(stock(name))
    model.set_attn_implementation("eager")  # the counter does not know the CPU's fused attention
    path = decoder_stack.find_decoder(model).path
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(1, 16, dtype=torch.long), use_cache=False)
    counted = counter.get_flop_counts()
    for i, cost in enumerate(measure_shape(stock(name), torch.float32, 16).costs):
        assert cost.flops == sum(counted[f"{type(model).__name__}.{path}.{i}"].values())


def test_operations_of_experts_are_those_of_the_experts_that_a_token_takes():
    narrow, wide = (measure_shape(stock("mixtral"), dtype, 16).costs for dtype in (torch.bfloat16, torch.float32))
    attention = 2 * 16 * (2 * 32 * 32 + 2 * 32 * 16) + 4 * 16 * 16 * 32
    experts = 2 * 16 * (2 * 3 * 32 * 64 + 4 * 32)  # two of four, and the router
    assert narrow[0].flops == wide[0].flops == attention + experts
    assert wide[0].saved == 2 * narrow[0].saved


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


def test_layers_that_differ_are_measured_apart():
    mixed = Qwen3NextConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=4, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, linear_num_value_heads=4, linear_num_key_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8,
    )  # fmt: skip
    shape = measure_shape(mixed, torch.bfloat16, 16)
    assert shape.costs[0] == shape.costs[1] != shape.costs[3]
    assert shape.dense.caches == {"linear": 3, "full": 1}


# --- the stages ---


@pytest.fixture(scope="module")
def llama() -> tuple[DecoderRunner, Any, torch.Tensor]:
    model = tiny.llama(12)
    return DecoderRunner(model), measure_shape(model.config, torch.float32, 16), tiny.some_tokens(40, 16)


def run_of(shape: Any, segment: Segment, rows: int = 8, *, method: str = "exhaustive", **parts: Any) -> Planned:
    config = CompressConfig(
        text=DataConfig(tokens=rows * 16, window=16), search=SearchConfig(ratio=0.25, method=method, effort="high"),
        evaluate=EvaluateConfig(eval_tokens=64), **{"heal": HealConfig(tune_tokens=64, batch_tokens=32)} | parts,
    )  # fmt: skip
    return Planned(
        config=config, shape=shape, reported=shape, tuned=shape, segments=[segment], after=shape.dense, tests=0,
        shortlisted=False, budget=Budget.of_cpu(), libraries=7,
    )  # fmt: skip


def layers_run(stage: Stage) -> tuple[float, float]:
    assert stage.work is not None
    return stage.work.forwards, stage.work.backwards


@pytest.mark.parametrize("method", ["exhaustive", "clp", "fisher", "race", "cosine", "perplexity", "taylor", "sleb"])
def test_layers_that_a_search_runs_are_near_those_that_it_counts(llama, method):
    (stack, shape, tokens), rows = llama, 40
    cost = search(stack, tokens[:rows], n_layers=3, method=method, seed=0).cost
    there, back = layers_run(stages(run_of(shape, Segment(0, 3), rows, method=method))["search"])
    if method not in ("exhaustive", "clp", "fisher", "race"):  # a baseline's own cost is without the cut of its pick
        there -= layers_run(stages(run_of(shape, Segment(0, 3), rows, method="random"))["search"])[0]
    assert cost.layer_forwards == pytest.approx(there, rel=0.5)
    # of wells some meet, and have moved from where they began
    assert cost.layer_backwards == pytest.approx(back, rel=0.5 if method == "clp" else 0.1)
    if method == "exhaustive":
        assert cost.layer_forwards == there


def test_where_nothing_folds_a_shortlist_has_no_folds(llama):
    high = replace(run_of(llama[1], Segment(2, 5)), shortlisted=True)
    normal = replace(high, config=replace(high.config, search=SearchConfig(ratio=0.25, method="exhaustive")))
    for run, folds_alone in ((high, False), (normal, True)):
        plain, nothing, folded = (
            layers_run(stages(replace(run, **how))["search"])[0]
            for how in ({"shortlisted": False}, {"foldable": False}, {"foldable": True})
        )
        assert nothing < folded
        assert (nothing == plain) is folds_alone


@pytest.mark.parametrize("radius", [1, 2])
def test_the_state_of_tuning_is_what_tuning_reports(llama, radius):
    dense, shape, tokens = llama
    student = DecoderRunner(decoder_stack.share(dense.model))
    cut_segment_(student.model, [Segment(4, 7)])
    student = DecoderRunner(student.model)
    report = tune_(student, dense, tokens[:2], heldout=tokens[2:4], batch_tokens=32, radius=radius)
    heal = HealConfig(tune_tokens=64, batch_tokens=32, radius=radius)
    peak = stages(run_of(shape, Segment(4, 7), heal=heal))["tune"].peak
    # the masters' state in float32, and the parameters themselves, their gradients and their best values
    assert peak["trained state"] == report.state_bytes + 3 * 4 * report.trained_parameters


def test_layers_on_disk_take_two_of_them_and_hidden_states_of_all_rows(llama):
    shape = llama[1]
    runs = [run_of(shape, Segment(2, 5), load=ModelConfig(place=place)) for place in ("disk", "memory")]
    on_disk, in_memory = ({name: stage.peak for name, stage in stages(run).items()} for run in runs)
    assert on_disk.keys() == in_memory.keys()
    token = shape.hidden * 4
    for peak in on_disk.values():
        assert peak["weights in memory"] + peak["two layers"] == 4 * (shape.outside + 2 * shape.dense.layers[0])
    assert on_disk["search"]["streams"] > 10 * 8 * 16 * token
    assert on_disk["eval"]["streams"] == 2 * 64 * token
    assert on_disk["tune"]["trained state"] == in_memory["tune"]["trained state"]
    # of the layers from the one before the cut on, the input of 32 tokens each, and two more states
    assert on_disk["tune"]["inputs of a step"] == (9 - 1 + 2) * 32 * token


def test_chats_quantization_and_what_is_trained_after_it_are_counted(llama):
    shape = llama[1]
    chats = [HealConfig(tune_tokens=2560, chat_share=share) for share in (0.0, 0.1)]
    plain, written = (stages(run_of(shape, Segment(2, 4), heal=heal))["text"].work for heal in chats)
    assert written.wide_steps - plain.wide_steps == 12 * (16 + 16), "16 tokens one by one, to tune on and held out"
    rounded = {
        (name, how): stages(run_of(shape, Segment(2, 4), quantize=QuantizeConfig(bits=4, quantizer=name), heal=after))[
            "quantize"
        ]
        for name in ("gptq", "rtn")
        for how in ("none", "auto", "rounding")
        for after in [HealConfig(tune_tokens=64, batch_tokens=32, tune_quantized=how)]
    }
    assert layers_run(rounded["rtn", "none"]) == (0, 0)
    assert layers_run(rounded["gptq", "none"]) == (3 * 8 * 12, 8 * 12)
    assert layers_run(rounded["gptq", "auto"]) > layers_run(rounded["gptq", "none"])
    parts = [rounded["rtn", how].peak["trained state"] for how in ("auto", "rounding")]
    assert parts[1] > 10 * parts[0]


def test_time_is_work_over_rates():
    rates = Rates(
        forward=10.0, backward=5.0, trained=4.0, flops64=5.0, logit=2.0, step=0.5, wide_step=0.25, memory=2.0, disk=None
    )
    work = Work(flops=20, back=10, trained=4, flops64=5, logits=3, moved=4, steps=8, wide_steps=16, read=2, fixed=3)
    assert rates.seconds(work) == 20 / 10 + 10 / 5 + 4 / 4 + 5 / 5 + 3 * 2 + 4 / 2 + 8 / 2 + 16 / 4 + 2 / 2 + 3


@pytest.mark.parametrize("name", FAMILIES)
def test_a_layer_of_each_family_is_timed_as_its_model_calls_it(name, tmp_path):
    """The same shapes come out as the model's own layer gives, and every figure is of something that was run."""
    shape, place = measure_shape(stock(name), torch.float32, 16), torch.device("cpu")
    layer, call, hidden = real_layer(stock(name), torch.float32, place, 2, 16)
    assert hidden.shape == call(hidden).shape == (2, 16, 32)
    assert len([*layer.parameters()]) == len(
        [*decoder_stack.find_decoder(tiny.tiny(stock(name))).layers[3].parameters()]
    )
    rates = Rates.measured(stock(name), shape, torch.float32, place, tmp_path, limit=0.0)
    assert rates
    assert min(value for value in asdict(rates).values() if value is not None) > 0


def test_progress_has_the_share_of_each_stage_of_a_run(tiny_model):
    few = {"ratio": 0.25, "data": "python-docs", "tokens": 64, "window": 16, "tune_tokens": 64, "eval_tokens": 64}
    found = shares(resolve(str(tiny_model), from_flat(few), "report"))
    assert [*found] == ["text-tuning", "search", "fold", "heal", "eval", "capabilities", "export"]
    assert min(found.values()) > 0
    assert shares(resolve(str(tiny_model), from_flat(few | {"ratio": None, "max_loss": 0.1}), "report")) == {}


# --- what fits ---


def test_flags_are_named_until_it_fits(monkeypatch):
    shape = measure_shape(stock("llama-untied"), torch.float32, 16)
    planner = Planner(
        checkpoint=None, stock=None, whole=None, dtypes={True: torch.float32}, segments=CUT, after=shape.dense, base=0,
        shapes={(16, torch.float32): shape},
    )  # fmt: skip
    config = CompressConfig(
        text=DataConfig(window=16), search=SearchConfig(ratio=0.2), heal=HealConfig(batch_tokens=64)
    )
    whole = 4 * shape.dense.total

    def costs(_: Any, asked: CompressConfig, on_cpu: bool, room: int) -> dict[str, Stage]:
        weights = whole // 10 if asked.load.place == "disk" else whole
        return {"tune": Stage({"weights": weights, "kept": asked.heal.batch_tokens}, None)}

    monkeypatch.setattr(Planner, "costs", costs)

    def judged(room: int, devices: int = 1) -> tuple[int, bool, list[str] | None]:
        found = planner.judged(Place(name="x", bytes=room, devices=devices, accelerator=False), config)
        return found["devices_used"], found["fits"], found["flags"]

    assert judged(whole + 64) == (1, True, [])
    assert judged(whole + 1) == (1, False, ["--batch-tokens 1"])
    assert judged(whole // 2) == (1, False, ["--place disk"])
    assert judged(whole // 20) == (1, False, None)
    assert judged(whole - 1, devices=2)[:2] == (2, False), "beside its half each gathers layers"
    assert judged(whole - 1, devices=8)[:2] == (8, True)
    assert judged(whole // 20, devices=4)[2] is None
    shortest, _ = [*savings(replace(config, text=DataConfig(window=256)), spread=False)][-1]
    assert shortest == ["--place disk", "--batch-tokens 1", "--window 64"]


# --- the command ---


def test_a_config_alone_is_enough_and_nothing_is_fetched(bare, monkeypatch, capsys):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("went to the network"))
    plan = planned(capsys, bare, "--ratio=0.3", "--bits=3", "--group-size=16")
    assert plan["layers"] == {"before": 6, "after": 4}
    assert plan["segments"] == [[2, 4]]
    assert plan["parameters"]["after"]["total"] == pruned_parts(stock("qwen2-tied"), torch.float32, CUT, 2)[1].total
    assert plan["seconds"] is plan["machine"] is None
    assert [*plan["stages"]] == ["load", "text", "search", "fold", "tune", "quantize", "eval", "capabilities", "export"]
    for name, stage in plan["stages"].items():
        assert stage["peak_bytes"] == sum(stage["parts"].values())
        assert name == "load" or stage["parts"]["weights"] == plan["bytes"]["before"]["saved"]
    for size in plan["bytes"].values():
        assert size["4 bits"] < size["asked"] < size["8 bits"] < size["saved"], "in 3 bits, with a scale for 16 numbers"
    assert [fit["fits"] for fit in plan["fits"][-2:]] == [True, True]


def test_probes_and_reported_windows_are_counted(bare, capsys):
    base, text, long = (
        planned(capsys, bare, "--ratio=0.3", "--window=64", "--tokens=1024", "--eval-tokens=16", *more)["stages"]
        for more in (["--eval-window=16"], ["--eval-window=16", "--preserve=none"], ["--eval-window=128"])
    )
    assert base["search"]["layer_forwards"] > 1.5 * text["search"]["layer_forwards"]
    assert base["capabilities"]["layer_forwards"]
    assert "capabilities" not in text
    assert long["eval"]["parts"]["logits or layer"] > base["eval"]["parts"]["logits or layer"]
    assert long["search"]["flops"] == base["search"]["flops"]


def test_tables_and_a_calibration(bare, capsys):
    assert main(["plan", str(bare), "--segment=1:3", "--window=16", "--tokens=64", "--tune-tokens=0"]) == 0
    words = capsys.readouterr().out
    for told in ("segment 1:3 (given)", "tied to the embedding", "8 x 80 GB GPUs"):
        assert told in words
    assert "tune" not in words, "nothing is tuned"


@pytest.mark.parametrize(
    ("name", "flags", "fold", "train", "tuned"),
    [
        ("gemma2", ["--segment=1:2", "--segment=4:6"], "attention, MLP, behind norms", "endpoints", [0, 1, 2]),
        ("mixtral", ["--ratio=0.3", "--no-fold"], "", "endpoints", [1, 2]),
        ("mixtral", ["--ratio=0.3", "--no-fold", "--train=lora"], "", "lora", [0, 1, 2, 3]),
    ],
)
def test_what_heals_is_said(name, flags, fold, train, tuned, tmp_path, capsys):
    flags = ["--window=16", *flags]
    stock(name).save_pretrained(tmp_path)
    plan = planned(capsys, tmp_path, *flags)
    assert plan["healing"] == {"fold": fold, "train": train, "tuned": tuned}
    assert ("fold" in plan["stages"]) == bool(fold)
    assert main(["plan", str(tmp_path), "--no-calibrate", *flags]) == 0
    how = "LoRA on" if train == "lora" else "tuning of"
    said = f"healing: {f'fold ({fold})' if fold else 'no fold'}, {how} {len(tuned)} layers"
    assert said in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", FAMILIES)
def test_what_folds_is_what_a_layer_is_found_to_have(name):
    model = tiny.tiny(stock(name))
    found = find_targets(DecoderRunner(model), 2, tiny.some_tokens(2, 16))
    said = what_folds(model.config)
    assert ("attention" in said, "MLP" in said or "experts" in said) == (len(found) > 0, len(found) > 1)
    assert ("behind norms" in said) == all(each.norm is not None for each in found)


def test_work_that_is_not_known_is_null(bare, monkeypatch, capsys):
    monkeypatch.setitem(criteria.registered, "test-mine", lambda runner, tokens, length: [])
    for method in ("test-mine", "evolution"):
        plan = planned(capsys, bare, "--ratio=0.3", f"--method={method}")
        assert plan["stages"]["search"]["flops"] is plan["stages"]["search"]["layer_forwards"] is None
        assert bool(plan["search_is"]) is (method == "test-mine")
    chosen = planned(capsys, bare, "--ratio=0", "--bits=auto", "--target-size=60kB")
    assert not {"search", "fold", "tune"} & chosen["stages"].keys(), "nothing is removed"


@pytest.mark.parametrize("flags", [["--on=h100"], ["--device=cuda"]])
def test_a_gpu_is_planned_by_name_where_there_is_none(bare, flags, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["plan", str(bare), "--ratio=0.3", "--window=16", "--json", *flags]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["device"] == plan["fits"][0]["target"].removeprefix("one ") == flags[0][5:].replace("ice=cuda", "a100")
    assert plan["seconds"] > 0


def test_of_a_hub_model_only_the_config_is_fetched(bare, monkeypatch):
    fetched = []
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda name, file, **_: fetched.append((name, file)) or str(bare / file)
    )
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("fetched everything"))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None)
    assert checkpoints.resolve("owner/name", weights=False).folder == bare
    assert fetched == [("owner/name", "config.json")]


def test_every_setting_that_costs_something_can_be_planned_and_has_its_default():
    ours, theirs = (asdict(cls()) for cls in (PlanConfig, CompressConfig))
    for name in ("run", "tasks", "long"):
        theirs.pop(name, None)
    assert {key: ours[key] for key in theirs} == theirs


@pytest.mark.parametrize(
    "flags",
    [
        [], ["--ratio=0.01"], ["--segment=4:9"], ["--ratio=0.3", "--window=4096"], ["--ratio=0.3", "--dtype=float8"],
        ["--ratio=0.3", "--place=disk", "--bits=4"], ["--ratio=0.3", "--for=vllm", "--bits=3"],
        ["--ratio=0.3", "--preserve=nonsense"], ["--ratio=0", "--bits=auto", "--target-size=1kB"],
    ],
)  # fmt: skip
def test_settings_that_a_run_would_refuse_are_refused(bare, capsys, flags):
    usual = [] if "--window" in str(flags) else ["--window=16"]
    assert main(["plan", str(bare), "--no-calibrate", *usual, *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "hint: " in captured.err


@pytest.mark.parametrize("other", [None, BertConfig(architectures=["BertForMaskedLM"])])
def test_what_is_no_causal_model_is_refused(tmp_path, capsys, other):
    if other is not None:
        other.save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--ratio=0.3", "--no-calibrate"]) == 2
    assert "hint: " in capsys.readouterr().err
    with pytest.raises(LayercutError):
        plan_run(str(tmp_path), PlanConfig(search=SearchConfig(ratio=0.3), calibrate=False))
