"""The whole journey with the decoder layers left on disk gives what it gives in memory, to the bit."""

from __future__ import annotations

import gc
import json
import shutil
import signal
import subprocess
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file
from test_stream import MODELS, saved

import tiny
from layercut.cli.command_line import main
from layercut.config import TuneSettings
from layercut.distributed import processes
from layercut.errors import ConfigError, ModelError, RunError, SurgeryError
from layercut.evaluation import perplexity
from layercut.export import checkpoint
from layercut.healing import endpoint_tuning as room
from layercut.healing import tune_
from layercut.healing.endpoint_tuning import TuningFiles, frozen_states
from layercut.healing.inputs import Batch, Rows
from layercut.healing.least_squares import fold_cut_
from layercut.models import checkpoints, decoder_stack, layer_reader, loading, memory, placement
from layercut.models.losses import KL, mean_kl
from layercut.models.runner import DecoderRunner
from layercut.pipeline.stages.heal import TUNING_STATE, TUNING_STATES
from layercut.report.stage_lines import describe_export
from layercut.segments import Segment
from layercut.surgery import check_checkpoint_cut, cut_checkpoint, cut_segment_

RUN = ["--ratio=0.25", "--tokens=128", "--window=16", "--tune-tokens=192", "--eval-tokens=64", "--no-speed"]
RUN += ["--batch-tokens=32", "--learning-rate=0.001"]


def read(run, name):
    return json.loads((run / f"{name}.json").read_text())


def test_every_stage_finds_the_same(tiny_model, texts, tmp_path, monkeypatch):
    monkeypatch.setattr("layercut.models.memory.PASS_TOKENS", 16)  # a step is several passes
    argv = ["compress", str(tiny_model), *RUN, f"--data={texts[0]}", f"--eval-data={texts[1]}"]
    both = disk, memory = tmp_path / "disk", tmp_path / "memory"
    for run in both:
        assert main([*argv, f"--place={run.name}", f"--out={run}"]) == 0
    for stage, told in {
        "search": ("segments", "candidates"), "cut": ("segments", "original_layer_index", "parameters", "bytes"),
        "fold": ("fold", "changed"), "eval": ("perplexity",),
    }.items():  # fmt: skip
        ours, theirs = read(disk, stage), read(memory, stage)
        assert {key: ours[key] for key in told} == {key: theirs[key] for key in told}
    ours, theirs = read(disk, "heal")["tuning"], read(memory, "heal")["tuning"]
    assert ours["heldout"] == theirs["heldout"]
    assert [point["loss"] for point in ours["curve"]] == [point["loss"] for point in theirs["curve"]]
    assert ours["best_step"] > 0
    for file in ("folded", "tuned"):
        assert (disk / f"{file}.safetensors").read_bytes() == (memory / f"{file}.safetensors").read_bytes()
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in both)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert {json.loads((run / "model" / "config.json").read_text())["num_hidden_layers"] for run in both} == {6}
    check = read(disk, "export")["check"]
    assert check["logits"] == "equal to the bit"
    assert "left on disk" in check["how"]
    assert check["cached_generation"] is None


def test_a_checkpoint_that_does_not_fit_a_second_time_is_verified_from_disk(tiny_model, tmp_path, monkeypatch):
    loaded = loading.load(checkpoints.resolve(str(tiny_model)))
    numbers = sum(p.numel() for p in loaded.model.parameters())
    monkeypatch.setattr(memory, "available_bytes", lambda _: numbers * (4 + loaded.dtype.itemsize) - 1)
    check = checkpoint.export_checkpoint(loaded.model, loaded.tokenizer, tmp_path / "model")["check"]
    assert check["logits"] == "equal to the bit"
    assert "kB to load it whole were not free" in check["how"]
    assert check["cached_generation"] is None
    assert check["how"] in describe_export({"check": check}, tmp_path)
    next(loaded.model.parameters()).data[:, 0] += 1  # in memory, and not in the files
    monkeypatch.setattr(checkpoint, "subprocess", subprocess)  # not forked off
    with pytest.raises(checkpoint.ReloadError, match="logits differ"):
        checkpoint.verify(loaded.model, tmp_path / "model")


# --- a second model over the same layers ---


def opened(checkpoint, segments, mode, **how):
    """Stacks over a model and its cut copy, in memory or on disk."""
    model = placement.load(checkpoint, place=mode, **how).model
    student = decoder_stack.share(model)
    cut_segment_(student, segments)
    return DecoderRunner(model), DecoderRunner(student)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama of 8 layers, saved in several shards."""
    return saved(tiny.llama(), tmp_path_factory.mktemp("llama"))


CUT = [Segment(3, 5)]


def test_a_cut_copy_borrows_the_layers_it_has(llama):
    dense, student = opened(llama, CUT, "disk")
    disk, tokens = layer_reader.layers_on_disk(dense.model), tiny.some_tokens(2)
    expected = opened(llama, CUT, "memory")[1].model(input_ids=tokens).logits
    read = disk.files.bytes_read
    assert torch.equal(student.model(input_ids=tokens).logits, expected)
    assert disk.files.layers_read == [1, 1, 1, 0, 0, 1, 1, 1]  # and none read ahead in vain
    assert disk.files.bytes_read - read == sum(p.nbytes for p in student.layers.parameters())
    disk.files.leave_()
    assert all(p.is_meta for p in student.layers.parameters())
    again = decoder_stack.share(student.model)  # a copy of a copy, from which more is cut
    cut_segment_(again, [Segment(0, 1)])
    twice = opened(llama, [Segment(0, 1), *CUT], "memory")[1].model
    assert torch.equal(again(input_ids=tokens).logits, twice(input_ids=tokens).logits)
    assert disk.files.layers_read == [1, 2, 2, 0, 0, 2, 2, 2]
    weights, clone_layers = student.model.state_dict(), sum(map(len, disk.files.clones))
    del again, weights
    gc.collect()
    assert sum(map(len, disk.files.clones)) < clone_layers, "copies are held for ever"


def test_what_a_copy_has_of_its_own_is_not_borrowed(llama):
    dense, student = opened(llama, CUT, "disk")
    disk, tokens = layer_reader.layers_on_disk(dense.model), tiny.some_tokens(2)
    dense_logits = dense.model(input_ids=tokens).logits
    name = "model.layers.3.mlp.down_proj.weight"  # layer 5 of the dense model
    decoder_stack.replace_parameters_(student.model, {name: torch.zeros(32, 64)})
    memory = opened(llama, CUT, "memory")[1].model
    decoder_stack.replace_parameters_(memory, {name: torch.zeros(32, 64)})
    assert torch.equal(student.model(input_ids=tokens).logits, memory(input_ids=tokens).logits)
    assert torch.equal(dense.model(input_ids=tokens).logits, dense_logits)
    disk.files.leave_()
    kept = [n for n, p in student.model.named_parameters() if "layers" in n and not p.is_meta]
    assert kept == [name]


def test_a_cut_that_changes_weights_of_layers_is_refused(llama):
    student = decoder_stack.share(placement.load(llama, place="disk").model)
    other = torch.nn.Parameter(torch.empty(64, 32, device="meta"), requires_grad=False)
    student.model.layers[2].mlp.up_proj.weight = other
    with pytest.raises(ModelError, match="other weights in layer 2"):
        DecoderRunner(student)


# --- fold, perplexity, files ---


@pytest.mark.parametrize("name", ["llama tied", "gpt2", "gemma2", "mixtral"])
def test_fold_perplexity_and_files_are_those_of_the_model_in_memory(name, tmp_path):
    checkpoint, segments = saved(MODELS[name](), tmp_path / "source"), [Segment(2, 3)]
    tokens, found, students = tiny.some_tokens(24), [], []
    for mode in ("disk", "memory"):
        dense, student = opened(checkpoint, segments, mode)
        folds = [fold_cut_(student, dense, segment, tokens) for segment in segments]
        found.append([folds, mean_kl(dense, student, tokens[:4], 1), perplexity(student.model, tokens[:6])])
        students.append(student.model)
        if mode == "disk":
            shared = {id(p) for p in dense.model.parameters()}
            healed = {n: p for n, p in student.model.named_parameters() if id(p) not in shared}
            stored = layer_reader.as_saved(student.model, healed)
            check_checkpoint_cut(checkpoint.folder, segments, stored)
            cut_checkpoint(checkpoint.folder, segments, tmp_path / "cut", healed=stored)
    assert found[0] == found[1]
    assert found[0][0][0].modules or name == "gemma2"  # behind its norms there is nothing to fold
    written = loading.load(checkpoints.resolve(str(tmp_path / "cut"))).model.state_dict()
    expected = students[1].state_dict()
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], expected[key]) for key in expected)


def test_a_healed_weight_without_a_place_in_the_files_is_refused(llama):
    with pytest.raises(SurgeryError, match="another way"):
        check_checkpoint_cut(llama.folder, CUT, {"model.layers.9.mlp.down_proj.weight": torch.zeros(32, 64)})


def test_what_is_computed_in_a_wider_format_is_saved_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "cpu_has", lambda feature: False)
    narrow = saved(tiny.llama().to(torch.bfloat16), tmp_path / "source")
    dense, student = opened(narrow, CUT, "disk")
    fold_cut_(student, dense, CUT[0], tiny.some_tokens(24))
    assert (student.model.dtype, student.stored_dtype) == (torch.float32, torch.bfloat16)
    shared = {id(p) for p in dense.model.parameters()}
    healed = {n: p for n, p in student.model.named_parameters() if id(p) not in shared}
    stored = layer_reader.as_saved(student.model, healed)
    cut_checkpoint(narrow.folder, CUT, tmp_path / "cut", healed=stored, dtype=dense.stored_dtype)
    assert {tensor.dtype for tensor in checkpoints.stored_tensors(tmp_path / "cut").values()} == {"BF16"}
    written = loading.load(checkpoints.resolve(str(tmp_path / "cut"))).model.state_dict()
    assert all(torch.equal(written[name], weight) for name, weight in healed.items())


# --- tuning ---

SETTINGS = {"mixed": {"objective": KL(mix=0.3)}, "next-token": {"objective": "next-token"}, "radius": {"radius": 2}}
LENGTHS = torch.tensor([16, 4, 8] * 8)


def tuned(checkpoint, mode, folder, segments, settings, tokens, lengths, **how):
    """The report of tuning, the weights after it, and the dense stack."""
    dense, student = opened(checkpoint, segments, mode, **how)
    states = None
    if mode == "disk":
        states = frozen_states(student, dense, Rows(tokens=tokens, row_lengths=lengths), settings, folder, key="")
    files, heldout = TuningFiles(states=states), tiny.some_tokens(8, 16, seed=3)
    report = tune_(student, dense, tokens, heldout=heldout, row_lengths=lengths, files=files, settings=settings)
    weights = {n: p for n, p in student.model.named_parameters() if n.startswith("model.layers.") and not p.is_meta}
    return report, weights, dense


@pytest.mark.parametrize(("name", "dtype"), [
    ("mixed", "float32"), ("next-token", "float32"), ("radius", "bfloat16"), ("parted", "bfloat16"),
])  # fmt: skip
def test_tuning_ends_in_the_same_bits(name, dtype, llama, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "PASS_TOKENS", 48)
    settings = TuneSettings(learning_rate=1e-3, batch_tokens=96, **SETTINGS.get(name, {}))
    segments, tokens = [Segment(2, 3), Segment(4, 6)], tiny.some_tokens(24, 16)
    lengths = LENGTHS if name == "parted" else None
    (ours, left, _), (theirs, right, _) = (
        tuned(llama, mode, tmp_path / "states", segments, settings, tokens, lengths, dtype=dtype)
        for mode in ("disk", "memory")
    )
    assert ours.heldout == theirs.heldout
    assert [p["loss"] for p in ours.curve] == [p["loss"] for p in theirs.curve]
    assert ours.best_step > 0 or name == "next-token"
    positions = {f"model.layers.{i}." for i in ours.trained_layers}
    left = {n: p for n, p in left.items() if n.startswith(tuple(positions))}
    assert len(left) == 9 * len(positions)
    assert all(torch.equal(p, right[n]) for n, p in left.items())


def test_a_frozen_layer_is_read_twice_a_step_and_one_below_the_cut_never(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "SCORES", 1)
    settings, tokens = TuneSettings(batch_tokens=64), tiny.some_tokens(24, 16)
    rows, parted_rows = Rows(tokens=tokens), Rows(tokens=tokens, row_lengths=LENGTHS)
    dense, student = opened(llama, CUT, "disk")
    disk = layer_reader.layers_on_disk(dense.model)
    states = frozen_states(student, dense, rows, settings, tmp_path / "states", key="")
    assert disk.files.layers_read == [1] * 8
    assert (tmp_path / "states" / "shared").stat().st_size == 24 * 16 * 32 * 4
    heldout, files = tiny.some_tokens(4, 16, seed=3), TuningFiles(states=states)
    tune_(student, dense, tokens, heldout=heldout, files=files, settings=settings)
    steps, scores = 6, 2
    assert max(disk.files.layers_read[:2]) <= 3  # for the tuning tokens, for the rows held out, and ahead in vain
    assert max(disk.files.layers_read[2:6]) <= 4  # and to be copied before training
    # of the two above the cut one is still there at either turn
    assert max(disk.files.layers_read[6:]) <= 2 + scores + steps + 2
    below = disk.files.layers_read[:2]
    again = frozen_states(student, dense, rows, settings, tmp_path / "states", key="")
    part = Batch(tokens[5:6], torch.tensor([5]), torch.tensor([0]))
    assert torch.equal(again.read("last", part), states.read("last", part))
    assert disk.files.layers_read[:2] == below, "states that are there are made again"
    with pytest.raises(ConfigError, match="the states were stored of rows of other lengths"):
        tune_(student, dense, tokens, heldout=heldout, files=files, row_lengths=LENGTHS, settings=settings)
    parted = frozen_states(student, dense, parted_rows, settings, tmp_path / "states", key="")
    assert not torch.equal(again.read("last", part), parted.read("last", part)), "those of whole rows stay"


def test_states_need_room(llama, tmp_path, monkeypatch):
    dense, student = opened(llama, CUT, "disk")
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000))
    rows = Rows(tokens=tiny.some_tokens(24, 16))
    with pytest.raises(RunError, match=r"1\.0 kB are free"):
        frozen_states(student, dense, rows, TuneSettings(), tmp_path / "states", key="")


def test_tuning_from_disk_that_was_stopped_ends_in_the_same_bits(tiny_model, texts, tmp_path, run_until, monkeypatch):
    """Killed after step 1, where the state was due; terminated within step 3."""
    monkeypatch.setattr(checkpoint, "verify_streamed", lambda *_: {})  # tested above
    run, log = tmp_path / "run", tmp_path / "log"
    argv = ["compress", str(tiny_model), *RUN, f"--data={texts[0]}", f"--eval-data={texts[1]}", f"--out={run}"]
    argv.append("--place=disk")
    whole = tmp_path / "whole"
    tune = ["tune", *(flag for flag in argv[1:] if not flag.startswith(("--eval", "--no-speed", "--out")))]
    assert main([*tune, f"--out={whole}"]) == 0
    assert run_until("step/1", signal.SIGKILL, log, argv) == -signal.SIGKILL, log.read_text()
    made = (run / TUNING_STATES / "last").stat().st_mtime_ns
    assert run_until("step/2", signal.SIGTERM, log, argv) == -signal.SIGTERM, log.read_text()
    assert (run / TUNING_STATE).is_file()
    assert (run / TUNING_STATES / "last").stat().st_mtime_ns == made
    assert main([*tune, f"--out={run}"]) == 0
    assert not list(run.glob("tuning*"))
    assert (run / "tuned.safetensors").read_bytes() == (whole / "tuned.safetensors").read_bytes()
    ours, theirs = (read(folder, "heal")["tuning"] for folder in (run, whole))
    assert ours["heldout"] == theirs["heldout"]
    assert [p["loss"] for p in ours["curve"]] == [p["loss"] for p in theirs["curve"]]


# --- what is refused, and what is counted on ---


@pytest.mark.parametrize("flag", ["--bits=8", "--probes", "two processes"])
def test_what_needs_the_model_in_memory_is_refused_at_once(flag, tiny_model, texts, tmp_path, capsys, monkeypatch):
    argv = ["compress", str(tiny_model), *RUN, f"--data={texts[0]}", f"--eval-data={texts[1]}", "--place=disk"]
    words = f"{flag.partition('=')[0]} needs the model in memory"
    if flag == "two processes":
        monkeypatch.setattr(processes, "world", lambda: 2)
        words = "start one process"
    else:
        argv.append(flag)
    assert main([*argv, f"--out={tmp_path / 'run'}"]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
