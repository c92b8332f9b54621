"""Tasks: the arithmetic of retention against hand-made figures, and lm-eval against direct computation."""

from __future__ import annotations

import copy
import json
import logging
import math
import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

import folders
import quick
import tiny
from layercut import evaluation, memory_limit
from layercut.cli.command_line import main
from layercut.data.probes import ProbeRows
from layercut.errors import ConfigError, DataError, RunError
from layercut.evaluation import lm_eval_harness
from layercut.evaluation.probe_scores import Probes
from layercut.evaluation.retention import chance, flips, kept, mcnemar, representative_metric, standard_error
from layercut.files.json_values import write_json

# ---- the arithmetic ------------------------------------------------------------------------------------------


def test_chance_follows_the_choices_of_each_item():
    assert chance([4, 4, 4, 4]) == 0.25
    assert chance([2, 4]) == 0.375, "the mean of 1/2 and 1/4, not 1/3"
    assert chance(None) == 0.0
    assert chance([]) == 0.0


def test_flips_and_their_p_value():
    dense, compressed = [1, 1, 1, 0, 0, 1.0], [1, 0, 0, 1, 0, 0.0]
    assert flips(dense, compressed) == (3, 1)
    # two-sided exact binomial, by counting all 2^4 splits of the four flips: at least 3 on one side
    uneven = sum(1 for bits in range(16) if max(bits.bit_count(), 4 - bits.bit_count()) >= 3)
    assert mcnemar(3, 1) == Fraction(uneven, 16)
    assert mcnemar(0, 0) == mcnemar(5, 5) == 1.0
    assert mcnemar(10, 0) == 2 / 1024
    assert mcnemar(0, 10) == mcnemar(10, 0)
    assert 0 < mcnemar(3000, 2500) < 1e-10, "no overflow with thousands of items"
    assert flips([0.5, 1], [1, 1]) is None, "an F1 score does not flip"
    with pytest.raises(ValueError, match="not paired"):
        flips([1], [1, 0])


def test_standard_error_is_that_of_the_mean():
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    expected = torch.tensor(values).std(unbiased=True).item() / math.sqrt(5)
    assert standard_error(values) == pytest.approx(expected, rel=1e-6)
    assert standard_error([1.0]) is None


def test_kept_above_chance_is_null_where_the_dense_model_guesses():
    assert kept(0.4, 0.5) == pytest.approx(0.8)
    assert kept(0.4, 0.5, 0.25) == pytest.approx(0.6)
    assert kept(0.2, 0.25, 0.25) is None
    assert kept(0.1, 0.0) is None
    assert kept(0.2, 0.5, 0.25) == pytest.approx(-0.2), "below chance is below zero"


def record(values: list[float], choices: list[int] | None = None, metric: str = "acc", **more: Any) -> dict[str, Any]:
    score = sum(values) / len(values)
    metrics = {metric: {"values": values, "score": score, "higher_is_better": True}, **more}
    return {"metrics": metrics, "choices": choices, "items": len(values), "document_hash": "x"}


def test_a_row_compares_two_models_on_the_same_items():
    row = evaluation.compare_records(record([1, 1, 1, 0], [2, 2, 4, 4]), record([1, 0, 0, 1], [2, 2, 4, 4]))
    assert (row["dense"], row["compressed"], row["chance"]) == (0.75, 0.5, 0.375)
    assert (row["lost"], row["gained"], row["p_value"]) == (2, 1, 1.0)
    assert row["retention"] == pytest.approx(2 / 3)
    assert row["retention_above_chance"] is None, "four items tell three right ones from guessing no more than that"
    many = [record(right * 8, [2, 2, 4, 4] * 8) for right in ([1, 1, 1, 0], [1, 0, 0, 1])]
    assert evaluation.compare_records(*many)["retention_above_chance"] == pytest.approx(1 / 3)
    with pytest.raises(RunError, match="not scored on the same items"):
        evaluation.compare_records(record([1, 0]), {**record([1, 0]), "document_hash": "y"})


def test_retention_is_the_mean_over_tasks_that_count():
    rows = [
        evaluation.compare_records(record([1, 1, 1, 1], [4] * 4), record([1, 1, 1, 0], [4] * 4)),
        evaluation.compare_records(record([1, 0, 0, 0], [4] * 4), record([1, 0, 0, 0], [4] * 4)),  # at chance
        evaluation.compare_records(record([1, 1], metric="exact_match"), record([1, 0], metric="exact_match")),
    ]
    found = evaluation.retention(rows)
    assert found["mean"] == pytest.approx((0.75 + 1 + 0.5) / 3)
    assert found["above_chance"] == pytest.approx(((0.75 - 0.25) / 0.75 + 0.5) / 2)
    assert (found["tasks"], found["tasks_above_chance"]) == (3, 2)
    nothing = {"mean": None, "above_chance": None, "tasks": 0, "tasks_above_chance": 0}
    assert evaluation.retention([]) == nothing


def test_a_perplexity_is_compared_but_not_retained():
    def lower(score: float) -> dict[str, Any]:
        metrics = {"word_perplexity": {"values": None, "score": score, "higher_is_better": False}}
        return {"metrics": metrics, "choices": None, "items": 2, "document_hash": "x"}

    row = evaluation.compare_records(lower(30.0), lower(60.0))
    assert (row["dense"], row["compressed"], row["retention"], row["p_value"]) == (30.0, 60.0, None, None)
    assert evaluation.retention([row])["mean"] is None


def test_the_metric_that_speaks():
    both = record([1, 0], acc_norm={"values": [1, 1], "score": 1.0, "higher_is_better": True})
    assert representative_metric(both) == "acc_norm"
    assert representative_metric(record([1, 0], metric="exact_match,strict-match")) == "exact_match,strict-match"
    assert representative_metric(record([1, 0], metric="f1")) == "f1"


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

    run = lm_eval_harness._run
    monkeypatch.setattr(lm_eval_harness, "_run", count)
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
        return lm_eval_harness.definition(task, 4), evaluation.harness_version(folder)

    first, edited = prepared("prepared"), prepared("prepared", "items.select(range(len(items)))")
    assert prepared("prepared") == first
    assert edited[0] != first[0]
    assert edited[1] != first[1]
    assert prepared("part")[0] == prepared("part")[0] != first[0]


def test_a_healed_weight_changes_the_content(tasks):
    lm, tokenizer = model(), folders.tokenizer()
    before = lm_eval_harness.content_hash(lm, tokenizer)
    assert lm_eval_harness.content_hash(model(), folders.tokenizer()) == before
    lm.config.original_layer_index = [0, 1, 2]
    assert lm_eval_harness.content_hash(lm, tokenizer) == before, "where it came from is not what it computes"
    lm.model.layers[1].mlp.down_proj.weight[0, 0] += 1e-3
    assert lm_eval_harness.content_hash(lm, tokenizer) != before


def test_how_a_model_generates_is_part_of_the_content():
    lm, tokenizer = model(), folders.tokenizer()
    before = lm_eval_harness.content_hash(lm, tokenizer)
    lm.generation_config.repetition_penalty = 1.5
    assert lm_eval_harness.content_hash(lm, tokenizer) != before
    tokenizer.eos_token = tokenizer.bos_token
    assert lm_eval_harness.content_hash(model(), tokenizer) != before


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


def test_without_lm_eval_the_install_line_is_given(monkeypatch, tmp_path):
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


def test_compress_and_evaluate_score_both_models(task_folder, tiny_model, texts, tmp_path, capsys, monkeypatch):
    quick.leave_out(monkeypatch)
    for user in ("layercut.pipeline.stages.evaluate", "layercut.cli.evaluate_alone"):
        monkeypatch.setattr(f"{user}.probes_for", lambda *_, **__: few_probes())
    monkeypatch.setattr("layercut.evaluation.probe_scores.first_answer", lambda reply: "")
    run = tmp_path / "run"
    asked = ["--tasks=tiny_choices,tiny_sums", "--limit=6", f"--include-path={task_folder}", "--probes"]
    monkeypatch.chdir(tiny_model.parent)
    argv = ["compress", tiny_model.name, *SMALL, "--segment=3:5", f"--data={texts[0]}", f"--eval-data={texts[1]}"]
    assert main([*argv, *asked, f"--out={run}", "--long-context=128"]) == 0, capsys.readouterr().err
    summary = json.loads((run / "summary.json").read_text())
    assert summary["bytes"]["source"] == sum(file.stat().st_size for file in tiny_model.glob("*.safetensors"))
    row = summary["tasks"]["tiny_choices"]
    assert row["metric"] == "acc_norm"
    assert row["items"] == 6
    assert row["chance"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)
    assert row["compressed"] == pytest.approx(row["dense"] + (row["gained"] - row["lost"]) / 6)
    assert set(summary["retention"]) == {"mean", "above_chance", "tasks", "tasks_above_chance"}
    assert summary["long_context"]["window"] == 64, "the text ends before 128"
    assert {"tasks", "long"} <= set(summary["seconds"])
    page, card = (run / "report.html").read_text(), (run / "model" / "README.md").read_text()
    assert "tiny_choices" in page
    assert "tiny_choices" in card
    # every reply is judged as empty
    for name in ("dense", "compressed"):
        assert sum(cell["found"] for cell in summary["probes"]["keys"][name]) == 2
    assert [cell["found"] for cell in summary["probes"]["lists"]["compressed"]] == [0]
    assert "<td>2</td><td>100.0%</td><td>100.0%</td>" in page.partition('id="probes"')[2].partition("</section>")[0]

    again = [*argv, f"--out={run}"]
    before = started(run)
    assert main([*again, *asked, "--long-context=128"]) == 0
    assert started(run) == before, "nothing is run twice"
    scores = {file: file.stat().st_mtime_ns for file in (run / "tasks").iterdir()}
    monkeypatch.setattr("layercut.pipeline.stages.evaluate.CLEAR", 3.0)
    assert main([*again, *asked, "--long-context=128"]) == 0, "retention is counted by the rule of now"
    assert started(run)[len(before) :] == ["tasks", "summary"]
    assert {file: file.stat().st_mtime_ns for file in (run / "tasks").iterdir()} == scores, "from scores that are kept"
    assert main([*again, *asked, "--long-context=32"]) == 2, "what a finished run measured is not replaced"
    longest = json.loads((run / "summary.json").read_text())
    assert main(again) == 0
    bare = json.loads((run / "summary.json").read_text())
    for measured in ("tasks", "retention", "long_context", "probes"):
        assert bare[measured] == longest[measured], "what was measured of this model is told, asked for again or not"

    capsys.readouterr()
    scored = {file: file.stat().st_mtime_ns for file in (run / "tasks").iterdir()}
    assert len(scored) == 4
    monkeypatch.chdir(tmp_path)  # where no model of that name is
    assert main(["evaluate", str(run), *asked]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert lines[0][:5] == ["task", "metric", "items", "chance", "dense"]
    assert lines[1][:3] == ["tiny_choices", "acc_norm", "6"]
    told = {name: figures for name, *figures in lines}
    assert told["hidden keys found"] == ["2/2", "2/2"]
    assert told["values found in lists"] == ["0/1", "0/1"]
    assert len(told["recall: answers"]) == 2
    assert float(told["recall: KL, nats"][1]) > 0
    assert float(lines[1][4]) == pytest.approx(row["dense"], abs=1e-4)
    assert float(lines[1][6]) == pytest.approx(row["compressed"], abs=1e-4)
    after = {file: file.stat().st_mtime_ns for file in (run / "tasks").iterdir()}
    assert after == scored, "the exported model is the one that was scored: nothing is computed twice"

    assert main(["evaluate", str(run), f"--eval-data={texts[1]}", "--eval-tokens=64", "--window=16"]) == 0
    figures = {name: rest for name, *rest in (line.split("\t") for line in capsys.readouterr().out.splitlines())}
    (dense,), (compressed,), (ratio, error) = figures.values()
    assert [*figures] == ["dense", "pruned", "pruned / dense"]
    assert float(ratio) == pytest.approx(float(compressed) / float(dense), rel=1e-3)
    recorded = bare["perplexity"]["standard_error"]
    assert set(recorded) == {name for name in ("cut", "folded", "tuned") if bare["perplexity"][name]}
    assert error.startswith("± ")
    assert float(error[2:]) > 0

    again = ["evaluate", str(run), f"--eval-data={texts[1]}", "--eval-tokens=64", "--window=16", "--json"]
    assert main(again) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["perplexity"]["dense"] == pytest.approx(float(dense), abs=1e-4)
    assert found["ratio"]["standard_error"] == pytest.approx(float(error[2:]), abs=1e-4)
    assert (found["text"]["tokens"], found["text"]["window"]) == (64, 16)
    kept = [json.loads(file.read_text()) for file in (run / "evaluations").iterdir()]
    assert len(kept) == 2, "one of tasks, one of a text: the same question again replaces its answer"
    assert sorted(sorted(one["tasks"]) for one in kept) == [[], ["tiny_choices", "tiny_sums"]]
    assert next(one for one in kept if one["text"])["perplexity"] == found["perplexity"]
    assert "Measured afterwards" not in page
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "Measured afterwards" in page.partition('id="evaluations"')[2]
    assert "tiny_sums" in page.partition('id="evaluations"')[2].partition("</section>")[0]
    # of a run that has changed since, nothing is shown
    rounded = json.loads((run / "quantize.json").read_text())
    (run / "quantize.json").write_text(json.dumps({**rounded, "config_hash": "another"}))
    assert main(["report", str(run)]) == 0
    assert "Measured afterwards" not in (run / "report.html").read_text()

    for file in (run / "report.html", *(run / "model").iterdir()):  # what is published tells no place
        assert not any(str(place).encode() in file.read_bytes() for place in (tmp_path, texts[0].parent, tiny_model))

    capsys.readouterr()
    assert main(["evaluate", str(tiny_model), *asked]) == 0
    assert capsys.readouterr().out.splitlines()[0].split("\t") == [
        "task", "metric", "items", "chance", "score", "stderr",
    ]  # fmt: skip


def test_tasks_go_on_with_fewer_requests_at_once(monkeypatch):
    lm, rows = model(), []
    requests = [(("", ""), [5] * (9 - i), [i, i + 1]) for i in range(7)]
    wanted = lm_eval_harness.language_model(lm, folders.tokenizer(), 64)._loglikelihood_tokens(requests)
    forward = lm.forward

    def short(input_ids: Any, **how: Any) -> Any:
        rows.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(input_ids, **how)

    monkeypatch.setattr(lm, "forward", short)
    with memory_limit():
        adapter = lm_eval_harness.language_model(lm, folders.tokenizer(), 64)
        found = adapter._loglikelihood_tokens(requests)
        before = len(rows)
        adapter._loglikelihood_tokens(requests)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in wanted], rel=1e-5)
    assert rows[:3] == [7, 3, 1]
    assert max(rows[before:]) <= 2, "what follows knows"


def test_an_answer_without_a_token_of_its_own_is_refused():
    lm = lm_eval_harness.language_model(model(), folders.tokenizer(), 64)
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


def test_a_kept_score_that_is_no_number_is_read_as_one(tmp_path):
    file = tmp_path / "record.json"
    write_json(file, {"metrics": {"word_perplexity": {"score": math.inf, "higher_is_better": False}}})
    assert lm_eval_harness._kept(file) == {
        "metrics": {"word_perplexity": {"score": math.inf, "higher_is_better": False}}
    }
