"""Tasks: the arithmetic of retention against hand-made figures, and lm-eval against direct computation."""

from __future__ import annotations

import copy
import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import folders
import tiny
from layercut import evaluation, memory_limit
from layercut.cli.command_line import main
from layercut.data.probes import ProbeRows
from layercut.errors import ConfigError, DataError
from layercut.evaluation import tasks as harness
from layercut.evaluation.probe_scores import Probes, found_of
from layercut.evaluation.tasks import standard_error

# ---- lm-eval -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install '.[eval]'")
    return folders.write_tasks(tmp_path_factory.mktemp("lm_eval_tasks"))


def model(seed: int = 0) -> Any:
    return tiny.llama(3, vocab_size=folders.VOCABULARY, bos_token_id=0, eos_token_id=1, seed=seed)


@pytest.fixture(scope="module")
def tasks(task_folder: Path) -> dict[str, Any]:
    return evaluation.load_tasks(["tiny_choices", "tiny_tag"], task_folder)


@torch.no_grad()
def log_likelihood(lm: Any, tokenizer: Any, context: str, answer: str) -> float:
    """Of an answer after its context: lm-eval encodes both together and takes the context's tokens off."""
    whole, before = (tokenizer(text, add_special_tokens=False).input_ids for text in (context + answer, context))
    ids = torch.tensor([[tokenizer.bos_token_id, *whole]])
    logs = lm(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return logs.gather(1, ids[0, 1:, None]).squeeze(1)[len(before) :].sum().item()


def test_scores_are_those_of_direct_computation(tasks):
    lm, tokenizer = model(), folders.tokenizer()
    found = evaluation.score_tasks(lm, tokenizer, tasks, limit=9, name="dense", cache=None)["tiny_choices"]
    right = {"acc": [], "acc_norm": []}
    for document in list(tasks["tiny_choices"].eval_docs)[:9]:
        context = f"Question: {document['question']}\nAnswer:"
        scores = [log_likelihood(lm, tokenizer, context, f" {answer}") for answer in document["answers"]]
        normed = [score / len(answer) for score, answer in zip(scores, document["answers"], strict=True)]
        for metric, values in {"acc": scores, "acc_norm": normed}.items():
            right[metric].append(float(values.index(max(values)) == document["right"]))
    assert found["items"] == 9
    assert found["choices"] == [2, 3, 4] * 3
    for metric, expected in right.items():
        assert found["metrics"][metric]["values"] == expected
        assert found["metrics"][metric]["score"] == pytest.approx(sum(expected) / 9)
        assert 0 < sum(expected) < 9, "a reference that is all right or all wrong shows little"


def test_lm_eval_itself_gives_the_same_score_and_standard_error(tasks):
    from lm_eval.evaluator import evaluate as evaluate_directly
    from lm_eval.models.huggingface import HFLM

    lm, tokenizer = model(), folders.tokenizer()
    ours = evaluation.score_tasks(lm, tokenizer, tasks, limit=None, name="dense", cache=None)["tiny_choices"]
    wrapped = HFLM(pretrained=lm, tokenizer=copy.deepcopy(tokenizer), batch_size=1)
    alone = {"tasks": {"tiny_choices": tasks["tiny_choices"]}, "groups": {}}
    theirs = evaluate_directly(lm=wrapped, task_dict=alone)["results"]["tiny_choices"]
    for metric in ("acc", "acc_norm"):
        values = ours["metrics"][metric]["values"]
        assert ours["metrics"][metric]["score"] == theirs[f"{metric},none"]
        assert standard_error(values) == pytest.approx(theirs[f"{metric}_stderr,none"])


def test_generative_tasks_work_and_nothing_is_printed_or_changed(tasks, capfd):
    lm, tokenizer = model(), folders.tokenizer()
    weights = {id(p) for p in lm.parameters()}
    found = evaluation.score_tasks(lm, tokenizer, tasks, limit=2, name="dense", cache=None)["tiny_sums"]
    assert found["choices"] is None
    assert found["metrics"]["exact_match"]["values"] == [0.0, 0.0], "a random model does not add"
    assert capfd.readouterr() == ("", "")
    assert tokenizer.pad_token is None, "lm-eval's padding token would get into the exported tokenizer"
    assert {id(p) for p in lm.parameters()} == weights
    assert logging.getLogger("lm_eval").level != logging.CRITICAL


def test_scores_are_kept_by_content_and_a_stopped_run_goes_on(tasks, tmp_path, monkeypatch):
    runs = []

    def count(lm: Any, name: str, *more: Any) -> Any:
        runs.append(lm.title)
        if len(runs) == stop_at:
            raise KeyboardInterrupt
        return run(lm, name, *more)

    run = harness._run
    monkeypatch.setattr(harness, "_run", count)
    tokenizer = folders.tokenizer()

    def score(lm: Any, limit: int = 2) -> Any:
        return evaluation.score_tasks(lm, tokenizer, tasks, limit=limit, name="m", cache=tmp_path / "tasks")

    stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        score(model())
    stop_at = 0
    first = score(model())
    assert runs == ["tiny_choices, m", "tiny_sums, m", "tiny_sums, m"], "the finished task is not run again"
    assert score(model()) == first
    assert len(runs) == 3
    score(model(seed=1))
    assert len(runs) == 5, "another model"
    score(model(), limit=3)
    assert len(runs) == 7, "another limit"
    for file in (tmp_path / "tasks").iterdir():
        file.write_text('{"half": ')
    assert score(model()) == first
    assert len(runs) == 9, "a spoiled file counts as absent"


def test_what_a_task_is_goes_by_its_content(task_folder, tmp_path):
    """Not by where its functions are in memory, nor by where and since when its files lie; a helper's code counts."""
    code = (
        "\nfrom functools import partial\ndef helper(items):\n    return {}\n"
        "def prepared(items, other=0):\n    return helper(items)\npart = partial(prepared, other=1)\n"
    )

    def prepared(function: str, helper: str = "items") -> tuple[Any, Any]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        folders.write_tasks(folder)
        (folder / "data.py").write_text(folders.TASK_DATA + code.format(helper))
        (folder / "choices.yaml").write_text(folders.TASK_CHOICES + f"process_docs: !function data.{function}\n")
        task = evaluation.load_tasks(["tiny_choices"], folder)["tiny_choices"]
        return harness.definition(task, 4), evaluation.harness_version(folder)

    first, edited = prepared("prepared"), prepared("prepared", "items.select(range(len(items)))")
    assert prepared("prepared") == first
    assert edited[0] != first[0]
    assert edited[1] != first[1]
    assert prepared("part")[0] == prepared("part")[0] != first[0]


def test_a_healed_weight_changes_the_content(tasks):
    lm, tokenizer = model(), folders.tokenizer()
    before = harness.content_hash(lm, tokenizer)
    assert harness.content_hash(model(), folders.tokenizer()) == before
    lm.config.original_layer_index = [0, 1, 2]
    assert harness.content_hash(lm, tokenizer) == before, "where it came from is not what it computes"
    lm.model.layers[1].mlp.down_proj.weight[0, 0] += 1e-3
    assert harness.content_hash(lm, tokenizer) != before


def test_how_a_model_generates_is_part_of_the_content():
    lm, tokenizer = model(), folders.tokenizer()
    before = harness.content_hash(lm, tokenizer)
    lm.generation_config.repetition_penalty = 1.5
    assert harness.content_hash(lm, tokenizer) != before
    tokenizer.eos_token = tokenizer.bos_token
    assert harness.content_hash(model(), tokenizer) != before


# ---- what is refused -----------------------------------------------------------------------------------------


def test_an_unknown_task_is_refused_with_near_names(task_folder, monkeypatch):
    import lm_eval.tasks

    # lm-eval's own 14,000 tasks take seconds to list and are not what is tested
    own = lm_eval.tasks.TaskManager
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_path=None, **_: own(
        include_path=include_path, include_defaults=False))  # fmt: skip
    with pytest.raises(ConfigError, match="no task 'tiny_choises'") as refused:
        evaluation.check_tasks(("tiny_sums", "tiny_choises"), task_folder)
    assert "did you mean tiny_choices" in refused.value.hint
    evaluation.check_tasks(("tiny_sums", "tiny_tag"), task_folder)
    with pytest.raises(ConfigError, match="is no folder"):
        evaluation.check_tasks(("tiny_sums",), task_folder / "nowhere")


def test_a_task_whose_data_cannot_be_had_is_refused(task_folder, tmp_path):
    broken = folders.TASK_CHOICES.replace("data.choices", "data.missing").replace("tiny_choices", "tiny_broken")
    (tmp_path / "data.py").write_text("def missing(**_):\n    raise OSError('no such set')\n")
    (tmp_path / "broken.yaml").write_text(broken)
    with pytest.raises(DataError, match="'tiny_broken' cannot be loaded: no such set"):
        evaluation.load_tasks(["tiny_broken"], tmp_path)


def test_without_lm_eval_the_install_line_is_given(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    with pytest.raises(ConfigError, match="not installed") as refused:
        evaluation.check_tasks(("arc_easy",), None)
    assert "pip install" in refused.value.hint


# ---- the commands --------------------------------------------------------------------------------------------

SMALL = ["--tokens=64", "--window=16", "--eval-window=16", "--tune-tokens=0", "--eval-tokens=64"]
SMALL += ["--no-speed", "--no-fold"]


def started(run: Path) -> list[str]:
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [event["stage"] for event in events if event["name"] == "started"]


def few_probes() -> Probes:
    answers = torch.full((1, 16), -1)
    answers[0, 12] = 0
    names, lengths = ("recall",), torch.tensor([16])
    tests = ProbeRows(torch.arange(3, 19)[None], answers, torch.zeros(1, dtype=torch.int64), names, lengths)
    return Probes([(16, depth, [3, 4, 5], "") for depth in (0.0, 1.0)], [(16, 0.5, [3, 4], "¶¶")], tests, 16)


@pytest.fixture(scope="module")
def scored(task_folder, tiny_model, texts, tmp_path_factory):
    """A run that has scored tasks, probes and long windows; the flags that asked for them."""
    run = tmp_path_factory.mktemp("scored") / "run"
    asked = ["--tasks=tiny_choices,tiny_sums", "--limit=6", f"--include-path={task_folder}", "--probes"]
    with pytest.MonkeyPatch.context() as patch:
        for user in ("layercut.pipeline.stages.evaluate", "layercut.cli.single_stage"):
            patch.setattr(f"{user}.probes_for", lambda *_, **__: few_probes())
        patch.setattr("layercut.evaluation.probe_scores.first_answer", lambda reply: "")
        patch.chdir(tiny_model.parent)
        argv = ["compress", tiny_model.name, *SMALL, "--segment=3:5", f"--data={texts[0]}", f"--eval-data={texts[1]}"]
        argv += [f"--out={run}"]
        assert main([*argv, *asked, "--long-context=128"]) == 0
        yield run, argv, asked


def test_compress_scores_both_models(scored, tiny_model, texts):
    run, _, _ = scored
    summary = json.loads((run / "summary.json").read_text())
    row = summary["tasks"]["tiny_choices"]
    assert (row["metric"], row["items"]) == ("acc_norm", 6)
    assert row["chance"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)
    assert row["compressed"] == pytest.approx(row["dense"] + (row["gained"] - row["lost"]) / 6)
    assert {"mean", "above_chance", "tasks", "tasks_above_chance"} < set(summary["retention"])
    assert summary["long_context"]["window"] == 64, "the text ends before 128"
    for name in ("dense", "compressed"):
        assert sum(cell["found"] for cell in summary["probes"]["keys"][name]) == 2
    assert [cell["found"] for cell in summary["probes"]["lists"]["compressed"]] == [0]
    assert "tiny_choices" in (run / "report.html").read_text()
    assert "tiny_choices" in (run / "model" / "README.md").read_text()
    for file in (run / "report.html", *(run / "model").iterdir()):  # what is published tells no place
        assert not any(str(place).encode() in file.read_bytes() for place in (run, texts[0].parent, tiny_model))


def test_evaluate_scores_the_exported_model_and_keeps_what_it_found(scored, texts, tmp_path, capsys, monkeypatch):
    run, _, asked = scored
    summary = json.loads((run / "summary.json").read_text())
    scores = {file: file.stat().st_mtime_ns for file in (run / "tasks").iterdir()}
    monkeypatch.chdir(tmp_path)  # where no model of that name is
    assert main(["evaluate", str(run), *asked]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    row = dict(zip(lines[0], lines[1], strict=False))
    of = summary["tasks"]["tiny_choices"]
    assert (row["task"], row["metric"], row["items"]) == ("tiny_choices", "acc_norm", "6")
    assert float(lines[1][4]) == pytest.approx(of["dense"], abs=1e-4)
    assert float(lines[1][6]) == pytest.approx(of["compressed"], abs=1e-4)
    (kept,) = (json.loads(file.read_text()) for file in (run / "evaluations").iterdir())
    for probed in (kept["probes"][name] for name in ("dense", "compressed")):
        assert [found_of(probed[each]) for each in ("keys", "lists")] == [(2, 2), (0, 1)]
    assert kept["probes"]["compressed"]["capabilities"]["kl"]["recall"] > 0
    after = {file: file.stat().st_mtime_ns for file in (run / "tasks").iterdir()}
    assert after == scores, "the exported model is the one that was scored: nothing is computed twice"

    again = ["evaluate", str(run), f"--eval-data={texts[1]}", "--eval-tokens=64", "--window=16", "--json"]
    for _ in range(2):
        assert main(again) == 0
        found = json.loads(capsys.readouterr().out)
    assert found["ratio"]["value"] == pytest.approx(found["perplexity"]["compressed"] / found["perplexity"]["dense"])
    assert found["ratio"]["standard_error"] > 0
    assert (found["text"]["tokens"], found["text"]["window"]) == (64, 16)
    kept = [json.loads(file.read_text()) for file in (run / "evaluations").iterdir()]
    assert sorted(sorted(one["tasks"]) for one in kept) == [[], ["tiny_choices", "tiny_sums"]], "one of each question"
    assert next(one for one in kept if one["text"])["perplexity"] == found["perplexity"]


def test_what_a_run_measured_is_kept_and_nothing_is_run_twice(scored, monkeypatch):
    run, argv, asked = scored
    before = started(run)
    assert main([*argv, *asked, "--long-context=128"]) == 0
    assert started(run) == before
    scores = {file: file.stat().st_mtime_ns for file in (run / "tasks").iterdir()}
    monkeypatch.setattr("layercut.pipeline.stages.evaluate.CLEAR", 3.0)
    assert main([*argv, *asked, "--long-context=128"]) == 0, "retention is counted by the rule of now"
    assert started(run)[len(before) :] == ["tasks", "summary"]
    assert {file: file.stat().st_mtime_ns for file in (run / "tasks").iterdir()} == scores, "from scores that are kept"
    assert main([*argv, *asked, "--long-context=32"]) == 2, "what a finished run measured is not replaced"
    longest = json.loads((run / "summary.json").read_text())
    assert main(argv) == 0
    bare = json.loads((run / "summary.json").read_text())
    for measured in ("tasks", "retention", "long_context", "probes"):
        assert bare[measured] == longest[measured], "what was measured of this model is told, asked for again or not"


def test_tasks_go_on_with_fewer_requests_at_once(monkeypatch):
    lm, rows = model(), []
    requests = [(("", ""), [5] * (9 - i), [i, i + 1]) for i in range(7)]
    wanted = harness.language_model(lm, folders.tokenizer(), 64)._loglikelihood_tokens(requests)
    forward = lm.forward

    def short(input_ids: Any, **how: Any) -> Any:
        rows.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(input_ids, **how)

    monkeypatch.setattr(lm, "forward", short)
    with memory_limit():
        adapter = harness.language_model(lm, folders.tokenizer(), 64)
        found = adapter._loglikelihood_tokens(requests)
        before = len(rows)
        adapter._loglikelihood_tokens(requests)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in wanted], rel=1e-5)
    assert rows[:3] == [7, 3, 1]
    assert max(rows[before:]) <= 2, "what follows knows"


def test_an_answer_without_a_token_of_its_own_is_refused():
    lm = harness.language_model(model(), folders.tokenizer(), 64)
    with pytest.raises(DataError, match="no token of its own"):
        lm._loglikelihood_tokens([(("ba", ""), [5, 6], [7]), (("ba", ""), [5, 6], [])])


def test_a_task_that_samples_draws_the_same_for_every_model(tmp_path):
    sums = folders.TASK_SUMS.replace("do_sample: false", "do_sample: true, temperature: 1.0")
    (folders.write_tasks(tmp_path) / "sums.yaml").write_text(sums)
    tasks, lm, seen = evaluation.load_tasks(["tiny_sums"], tmp_path), model(), []
    generate = lm.generate
    lm.generate = lambda *given, **how: seen.append(generate(*given, **how).tolist()) or torch.tensor(seen[-1])
    state, own = torch.random.get_rng_state(), random.getstate()
    for _ in range(2):
        evaluation.score_tasks(lm, folders.tokenizer(), tasks, limit=None, name="x", cache=None)
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert random.getstate() == own
