"""LoRA on all layers: merged in exactly, and nobody else's weights; and all layers trained by themselves."""

import copy
import json
import re
import sys

import pytest
import torch
from safetensors.torch import load_file

import families
import tiny
from layercut import evaluation
from layercut.cli.command_line import main
from layercut.data.blocks import stored_blocks
from layercut.errors import ModelError
from layercut.healing import endpoint_tuning, tune_
from layercut.healing import lora as room
from layercut.healing.tuning_state import StateFile
from layercut.models import checkpoints, decoder_stack, loading
from layercut.models.runner import DecoderRunner
from layercut.segments import Segment
from layercut.surgery import cut

peft = pytest.importorskip("peft", reason="peft is not installed: pip install '.[lora]'")

MODELS = {"llama": tiny.llama, "gpt2": tiny.gpt2}  # GPT-2's maps are Conv1D, [in, out]


@pytest.mark.parametrize("family", MODELS)
def test_what_is_merged_in_is_what_peft_computes_and_the_dense_model_stays(family, monkeypatch):
    dense = MODELS[family]()
    before = copy.deepcopy(dense.state_dict())
    student, rows = cut(dense, [Segment(2, 4)]), tiny.some_tokens(20)
    adapted = {}

    def with_adapters(runner, merge=room.merge_):
        adapted["logits"] = runner.model(rows).logits.detach()
        merge(runner)

    monkeypatch.setattr(room, "merge_", with_adapters)
    found = tune_(student, dense, rows[:16].repeat(3, 1), heldout=rows[16:], batch_tokens=16, train="lora")
    assert found.best < found.heldout[0]["loss"]
    assert torch.allclose(student(rows).logits, adapted["logits"], atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    kept = [i for i in range(len(before)) if i not in (2, 3)]
    for name, value in student.named_parameters():
        old = ".".join(str(kept[int(part)]) if part.isdigit() else part for part in name.split("."))
        is_map = value.dim() == 2 and any(part.isdigit() for part in name.split("."))
        assert torch.equal(value, before[old]) != is_map, f"{name}: every map of every layer, and nothing else"
    assert not any(isinstance(module, peft.tuners.lora.LoraLayer) for module in student.modules())


@pytest.mark.parametrize("family", ["llama", "phimoe", "mamba"])  # a router that is a Linear; a mixer that peft refuses
def test_untrained_adapters_change_no_bit(family):
    student = families.tiny(family).to(torch.bfloat16)
    before, rows = copy.deepcopy(student.state_dict()), families.tokens()
    room.adapters_((runner := DecoderRunner(student)).layers)
    assert torch.isfinite(student(rows).logits).all(), "it runs with them"
    room.merge_(runner)
    assert student.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_what_several_layers_share_gets_no_adapter():
    student = tiny.llama()
    shared = student.model.layers[1].mlp
    student.model.layers[4].mlp = shared
    room.adapters_(student.model.layers)
    assert not any(isinstance(module, peft.tuners.lora.LoraLayer) for module in shared.modules())
    assert isinstance(student.model.layers[4].self_attn.q_proj, peft.tuners.lora.LoraLayer)


def test_a_model_whose_linear_maps_are_all_shared_is_refused():
    student = tiny.llama()
    for layer in student.model.layers[1:]:
        layer.self_attn, layer.mlp = student.model.layers[0].self_attn, student.model.layers[0].mlp
    with pytest.raises(ModelError, match="no layer of the model has a linear map"):
        room.check_lora(student)


@pytest.mark.parametrize(
    ("family", "told"), [("llama", ""), ("falcon", ""), ("gpt2", ""), ("mixtral", r"LoRA adapts \d\d?%")]
)
def test_what_is_left_as_it_is_is_said(family, told, monkeypatch):
    said = []
    monkeypatch.setattr(room, "say", lambda _, words: said.append(words))
    room.check_lora(families.tiny(family))  # Falcon's maps are of a class of its own, Mixtral's experts one tensor
    assert len(said) == bool(told)
    assert re.match(told, "".join(said))


def test_merged_weights_are_rounded_to_the_dtype_that_is_saved():
    """Where a processor has no bfloat16 such weights are computed with in float32."""
    student = tiny.llama().to(torch.bfloat16).float()
    student.stored_dtype, kept = torch.bfloat16, student.model.layers[0].mlp.down_proj
    kept.weight.data[0, 0] = 1 + 2**-20  # what a class keeps in float32 is saved in it
    runner = DecoderRunner(student)
    room.adapters_(runner.layers)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.01)
    room.merge_(runner)
    weight = student.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, weight.bfloat16().float())
    assert not torch.equal(kept.weight, kept.weight.bfloat16().float())


def test_all_layers_that_stay_are_trained_and_nothing_else():
    dense = tiny.llama()
    before, rows = copy.deepcopy(dense.state_dict()), tiny.some_tokens(20)
    student = cut(dense, [Segment(2, 4)])
    found = tune_(student, dense, rows[:16].repeat(3, 1), heldout=rows[16:], batch_tokens=16, train="all")
    assert found.best < found.heldout[0]["loss"]
    assert found.trained_layers == list(range(len(student.model.layers)))
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    shared = {id(parameter) for parameter in dense.parameters()}
    for name, parameter in student.named_parameters():
        assert (id(parameter) in shared) != ("layers." in name), name


def test_the_command_trains_what_is_asked_and_goes_on_to_the_same_weights(tiny_model, texts, tmp_path, monkeypatch):
    text, _ = texts
    flags = ["--segment=2:4", f"--data={text}", "--tokens=64", "--window=16", "--tune-tokens=512", "--batch-tokens=64",
             "--dtype=float32", "--preserve=none"]  # fmt: skip
    weights = {}
    for train in ("endpoints", "all", "lora"):
        out = tmp_path / train
        assert main(["tune", str(tiny_model), *flags, f"--train={train}", f"--out={out}"]) == 0
        weights[train] = load_file(out / "tuned.safetensors")
        found = json.loads((out / "heal.json").read_text())["tuning"]
        assert len(found["trained_layers"]) == (2 if train == "endpoints" else 6)
    assert weights["all"].keys() > weights["endpoints"].keys()
    assert not any("lora_" in name for name in weights["lora"])

    made, step = [], endpoint_tuning._Training.step_

    def killed(training):
        made.append(training)
        if len(made) == 5:
            raise KeyboardInterrupt
        return step(training)

    again = ["tune", str(tiny_model), *flags, "--train=lora", f"--out={tmp_path / 'again'}"]
    with monkeypatch.context() as patch:
        patch.setattr(endpoint_tuning._Training, "step_", killed)
        patch.setattr(StateFile, "due", lambda _: True)
        assert main(again) == 130
    assert (tmp_path / "again" / "tuning-state.safetensors").is_file()
    assert main(again) == 0
    went_on = load_file(tmp_path / "again" / "tuned.safetensors")
    assert all(torch.equal(value, weights["lora"][name]) for name, value in went_on.items())


@pytest.mark.parametrize("train", ["all", "lora"])
def test_layers_on_disk_are_not_all_trained(tiny_model, texts, tmp_path, capsys, train):
    flags = [
        "--segment=2:4",
        "--window=16",
        f"--data={texts[0]}",
        "--place=disk",
        f"--train={train}",
        f"--out={tmp_path / 'run'}",
    ]
    assert main(["tune", str(tiny_model), *flags]) == 2
    assert f"--train {train} needs the model in memory" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def command(tiny_model, texts):
    text, heldout = texts
    return [
        "compare", str(tiny_model), "--ratio=0.25", f"--data={text}", f"--eval-data={heldout}", "--tokens=64",
        "--window=16", "--eval-tokens=64", "--eval-window=16", "--dtype=float32", "--methods=2:4,3:5,angular",
    ]  # fmt: skip


def test_compare_trains_it_where_it_is_named_and_once(command, tiny_model, tmp_path, capsys):
    out, command = tmp_path / "run", [*command, "--tune-tokens=64"]
    assert main([*command, f"--out={out}"]) == 0
    assert "lora" not in json.loads((out / "compare.json").read_text())["methods"][0]["perplexity"]
    assert "lora" not in capsys.readouterr().out
    (out / "compare.json").unlink()
    assert main([*command, "--states=tuned,lora", f"--out={out}"]) == 0
    found = json.loads((out / "compare.json").read_text())
    model = loading.load(checkpoints.resolve(str(tiny_model)), dtype="float32").model
    for row in found["methods"]:
        (bounds,) = row["segments"]
        student = cut(model, [Segment(*bounds)])
        decoder_stack.replace_parameters_(
            student, load_file(out / f"compare-at-{bounds[0]}.{bounds[1]}-lora.safetensors")
        )
        measured = evaluation.perplexity(student, stored_blocks(out, "evaluation"))
        assert row["perplexity"]["lora"] == pytest.approx(measured, rel=1e-6)
        assert row["lora"]["trained_layers"] == list(range(6))
        begun = [row[way]["heldout"][0]["loss"] for way in ("lora", "tuning")]
        assert begun[0] == pytest.approx(begun[1], rel=1e-5)
        assert row["standard_error"]["lora"] > 0
    assert "lora" in capsys.readouterr().out
    (out / "compare.json").unlink()
    before = (out / "metrics.jsonl").read_text()
    assert main([*command, "--states=tuned,lora", f"--out={out}"]) == 0
    assert json.loads((out / "compare.json").read_text())["methods"] == found["methods"]
    assert "lora" not in (out / "metrics.jsonl").read_text().removeprefix(before), "nothing is trained twice"


def test_it_is_refused_before_anything_is_done(command, tmp_path, monkeypatch, capsys):
    assert main([*command, "--states=lora", f"--out={tmp_path / 'run'}"]) == 2
    assert "give --tune-tokens" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main([*command, "--states=cut,lora", "--tune-tokens=64", f"--out={tmp_path / 'run'}"]) == 2
    assert "pip install 'layercut[lora]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
