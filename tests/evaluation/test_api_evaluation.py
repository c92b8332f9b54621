"""`layercut.evaluate`, evaluations that packages bring, and `layercut.progress_to`."""

from __future__ import annotations

import importlib
import json
import math
import sys
import threading
from dataclasses import FrozenInstanceError
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny
from layercut import evaluation, progress, registries
from layercut.cli import main
from layercut.data.blocks import stored_blocks
from layercut.errors import ConfigError, DataError, LayercutError, ModelError
from layercut.evaluation import Evaluation, evaluate, likelihood
from layercut.models import decoder_stack, loading
from layercut.models.losses import kl_divergence
from layercut.models.runner import DecoderRunner
from layercut.progress import bar, progress_to
from layercut.report.run_facts import read_run
from layercut.segments import Segment
from layercut.surgery import cut_segment_

TOKENS = tiny.some_tokens(7, 24)


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    dense = tiny.llama()
    small = decoder_stack.share(dense)
    cut_segment_(small, [Segment(2, 4)])
    return dense, small


@pytest.fixture
def registry(monkeypatch) -> dict[str, Any]:
    """What is registered in a test is forgotten after it."""
    registered: dict[str, Any] = {}
    monkeypatch.setattr(registries.evaluations, "registered", registered)
    return registered


# ---- evaluate ------------------------------------------------------------------------------------------------


def test_the_figures_are_those_of_the_command_and_of_the_definition(pair):
    dense, small = pair
    found = evaluate(small, TOKENS, baseline=dense)
    losses = {name: evaluation.window_losses(model, TOKENS) for name, model in (("dense", dense), ("small", small))}
    assert found.losses == tuple(losses["small"].tolist()), "to the bit"
    assert found.baseline_losses == tuple(losses["dense"].tolist())
    assert found.perplexity == evaluation.of_losses(losses["small"]) == evaluate(small, TOKENS).perplexity
    assert found.ratio == found.perplexity / found.baseline_perplexity
    assert found.log_ratio_error == evaluation.paired_error(losses["small"], losses["dense"])
    assert found.ratio_error == found.ratio * found.log_ratio_error
    with torch.no_grad():
        p, q = (model(input_ids=TOKENS).logits[:, :-1] for model in pair)
    assert found.kl == pytest.approx(kl_divergence(p, q).mean().item(), rel=1e-5)
    assert evaluate(dense, TOKENS, baseline=dense).kl == pytest.approx(0, abs=1e-6)
    assert (found.tokens, found.window) == (7 * 24, 24)


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_windows_whose_logits_are_too_large_are_compared_in_parts(make, monkeypatch):
    dense, small = make(), make()
    cut_segment_(small, [Segment(2, 4)])
    whole = evaluate(small, TOKENS, baseline=dense)
    sizes = []
    for model in (dense, small):
        head = model.get_output_embeddings()
        head.register_forward_hook(lambda module, given, logits: sizes.append(logits.shape[:-1].numel()))
    for name in ("rows_per_chunk", "positions_at_once"):
        monkeypatch.setattr(likelihood, name, lambda model, tokens: max(1, 15 // tokens))
    parts = evaluate(small, TOKENS, baseline=dense)
    assert parts.kl == pytest.approx(whole.kl, rel=1e-5)
    assert (parts.perplexity, parts.ratio) == pytest.approx((whole.perplexity, whole.ratio), rel=1e-5)
    assert parts.losses == tuple(evaluation.window_losses(small, TOKENS).tolist()), "to the bit here too"
    assert max(sizes) <= 15


def test_models_are_left_as_they_are():
    model = tiny.gpt2()
    expected = evaluate(model, TOKENS).perplexity
    model.train().requires_grad_(True)  # with dropout, as GPT-2 has it
    model.transformer.h[0].eval()
    modes, config = [module.training for module in model.modules()], model.config.to_dict()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = evaluate(model, TOKENS, baseline=model, evaluations=[lambda *_, seed: {"x": 1}], tokenizer="any")
    assert found.perplexity == expected, "dropout is off"
    assert [module.training for module in model.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert model.config.to_dict() == config
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_has_a_model_is_taken_for_it(pair):
    dense, small = pair
    expected = evaluate(small, TOKENS, baseline=dense)
    assert evaluate(SimpleNamespace(model=small), TOKENS, baseline=DecoderRunner(dense)) == expected


def test_a_ruined_model_never_looks_good(pair):
    dense, _ = pair
    ruined = tiny.llama()
    ruined.lm_head.weight[5] = math.nan
    found = evaluate(ruined, TOKENS, baseline=dense)
    assert found.perplexity == found.ratio == math.inf
    assert found.log_ratio_error is None
    assert "perplexity inf" in str(found)


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ({"heldout": torch.zeros(24, dtype=torch.long)}, DataError, r"int64 \[24\]; allowed are token ids \[N, T\]"),
        ({"heldout": torch.zeros(2, 24)}, DataError, "float32"), ({"heldout": [[1, 2]]}, DataError, "list"),
        ({"heldout": torch.zeros(2, 1, dtype=torch.long)}, DataError, "T at least 2"),
        ({"heldout": torch.zeros(1, 129, dtype=torch.long)}, DataError, "128 positions"),
        ({"heldout": torch.full((2, 8), 96)}, ModelError, "token 96, and the model's vocabulary has 96"),
        ({"model": "org/name"}, ModelError, "a str is given as a model"),
        ({"baseline": torch.nn.Linear(2, 2)}, ModelError, "a Linear is given"),
        ({"baseline": tiny.llama(vocab_size=97)}, ModelError, "another vocabulary"),
        ({"evaluations": ["nobody"]}, ConfigError, "evaluation 'nobody' is unknown"),
        ({"evaluations": [print]}, ConfigError, "no tokenizer"),
        ({"evaluations": [print, print], "tokenizer": "any"}, ConfigError, "two evaluations are called 'print'"),
    ],
)  # fmt: skip
def test_wrong_input_is_told(pair, given, kind, words):
    arguments = {"model": pair[1], "heldout": TOKENS} | given
    with pytest.raises(kind, match=words) as caught:
        evaluate(arguments.pop("model"), arguments.pop("heldout"), **arguments)
    assert isinstance(caught.value, LayercutError)
    assert caught.value.hint


def test_the_result_is_plain_frozen_and_shown(pair):
    def odd(model: Any, tokenizer: Any, *, seed: int) -> dict[str, float]:
        return {"<b>score</b>": model.config.num_hidden_layers}

    found = evaluate(pair[1], TOKENS, baseline=pair[0], evaluations=[odd], tokenizer="any")
    assert Evaluation(**found.to_dict()) == found
    assert json.loads(json.dumps(found.to_dict()))["kl"] == found.kl
    with pytest.raises(FrozenInstanceError):
        found.kl = 0.0  # type: ignore[misc]
    page = found._repr_html_()
    assert "&lt;b&gt;score&lt;/b&gt;</th><td>6</td><td>8</td>" in page
    assert "<b>" not in page
    assert str(found).startswith(f"perplexity {found.perplexity:.4g}, {found.ratio:.4g} ± ")
    drawn = found.plot().lines[0]
    assert list(drawn.get_xdata()) == list(found.baseline_losses)
    assert list(drawn.get_ydata()) == list(found.losses)
    assert len(evaluate(pair[1], TOKENS).plot().lines) == 1


# ---- evaluations of others -------------------------------------------------------------------------------------


def test_an_evaluation_is_run_on_both_models_alike(pair, registry):
    asked = []

    @registries.evaluations.register("mypackage-draws")
    def draws(model: Any, tokenizer: Any, *, seed: int) -> dict[str, Any]:
        asked.append((model, tokenizer, seed, model.training, torch.is_grad_enabled()))
        layers = model.config.num_hidden_layers
        return {"drawn": torch.rand(()), "layers": layers, **({"only": math.inf} if layers == 8 else {})}

    draws.higher_is_better = {"layers": False}  # type: ignore[attr-defined]
    found = evaluate(
        pair[1], TOKENS, baseline=pair[0], evaluations=["mypackage-draws"], tokenizer="tokenizer", seed=3
    ).evaluations["mypackage-draws"]
    assert asked == [(model, "tokenizer", 3, False, False) for model in (pair[1], pair[0])]
    assert found["layers"] == {"model": 6.0, "baseline": 8.0, "higher_is_better": False}
    assert found["drawn"]["model"] == found["drawn"]["baseline"], "torch is seeded alike"
    assert found["only"] == {"model": None, "baseline": math.inf, "higher_is_better": None}


@pytest.mark.parametrize("returned", [None, 0.5, {"score": "good"}, {1: 0.5}, {"score": None}])
def test_an_evaluation_that_returns_no_figures_is_told(pair, returned):
    def wrong(model: Any, tokenizer: Any, *, seed: int) -> Any:
        return returned

    with pytest.raises(ConfigError, match=r"'wrong' returned .*; allowed is a mapping of metric to number"):
        evaluate(pair[1], TOKENS, evaluations=[wrong], tokenizer="any")


def test_the_command_runs_them_keeps_them_and_shows_them(registry, tiny_model, texts, tmp_path, capsys):
    calls = []

    @registries.evaluations.register("mypackage-head")
    def head(model: Any, tokenizer: Any, *, seed: int) -> dict[str, float]:
        calls.append(seed)
        ids = torch.tensor([tokenizer("ba ko rin")["input_ids"]])
        return {"layers": model.config.num_hidden_layers, "logit": model(input_ids=ids).logits[0, -1].max().item()}

    head.higher_is_better = {"layers": True}  # type: ignore[attr-defined]
    run = tmp_path / "run"
    argv = ["compress", str(tiny_model), "--tokens=64", "--window=16", "--eval-window=16", "--tune-tokens=0"]
    argv += ["--eval-tokens=64", "--no-speed", "--no-fold", "--segment=3:5", f"--out={run}", "--seed=2"]
    argv += [f"--data={texts[0]}", f"--eval-data={texts[1]}"]
    assert main([*argv, "--evaluations=mypackage-haed"]) == 2
    assert "did you mean --evaluations mypackage-head?" in capsys.readouterr().err
    assert not run.exists()
    asked = [*argv, "--evaluations=mypackage-head"]
    assert main(asked) == 0, capsys.readouterr().err
    summary = json.loads((run / "summary.json").read_text())
    found = summary["evaluations"]["mypackage-head"]
    assert found["layers"] == {"dense": 8.0, "compressed": 6.0, "higher_is_better": True}
    assert calls == [2, 2]
    shown = " ".join(capsys.readouterr().out.split())
    assert "mypackage-head, layers" in shown
    assert "−25.0%, worse" in shown
    for file in (run / "report.html", run / "model" / "README.md"):
        assert "mypackage-head" in file.read_text()
        assert "−25.0%, worse" in file.read_text()

    assert main(asked) == 0
    assert calls == [2, 2], "nothing is run twice"
    assert main(argv) == 0, "that they are not asked for any more loses nothing"
    assert json.loads((run / "summary.json").read_text())["evaluations"] == summary["evaluations"]
    assert (run / "evaluations.json").is_file()
    assert main(asked) == 0
    assert calls == [2, 2]

    capsys.readouterr()
    assert main(["evaluate", str(run), "--evaluations=mypackage-head", "--seed=5"]) == 0
    assert calls == [2, 2, 5, 5]
    assert main(argv) == 0
    assert len(read_run(run).evaluations) == 1, "it is of the same model, whatever else the run measures"
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert lines[:2] == [["evaluation", "metric", "dense", "pruned"], ["mypackage-head", "layers", "8.0000", "6.0000"]]
    assert float(lines[2][3]) == pytest.approx(found["logit"]["compressed"], abs=1e-4)
    assert main(["report", str(run)]) == 0
    assert "mypackage-head" in (run / "report.html").read_text().partition('id="evaluations"')[2]
    capsys.readouterr()
    assert main(["evaluate", str(tiny_model), "--evaluations=mypackage-head", "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)["evaluations"]["mypackage-head"]
    assert alone["layers"] == {str(tiny_model): 8.0, "higher_is_better": True}

    # what the run reports is what the function gives on the models themselves
    blocks = stored_blocks(run, "evaluation")
    small, dense = (loading.load(loading.checkpoints.resolve(str(f))).model for f in (run / "model", tiny_model))
    again = evaluate(small, blocks, baseline=dense)
    assert again.perplexity == summary["perplexity"]["cut"]
    assert again.baseline_perplexity == summary["perplexity"]["dense"]
    assert again.log_ratio_error == summary["perplexity"]["standard_error"]["cut"]


def test_what_a_part_calls_is_part_of_how_it_is_written(tmp_path, monkeypatch):
    """A constant that a helper reads, the file of a base, what a partial gives."""
    base = "import layercut as lc\nSIGN = 1\nclass Base(lc.Objective):\n    label = 'mine'\n"
    own = (
        "from functools import partial\nfrom own_base import Base\nRATE = 1\ndef figure():\n    return RATE\n"
        "def part(model, tokenizer, *, seed):\n    return {'x': figure()}\nbound = partial(part, 1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def digests(base: str, own: str) -> list[str]:
        mine = "from own_base import Base\nclass Mine(Base):\n    pass\n"
        for name, text in {"own_base": base, "own_part": own, "own_class": mine}.items():
            (tmp_path / f"{name}.py").write_text(text)
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        part, of_class = importlib.import_module("own_part"), importlib.import_module("own_class")
        return [evaluation.source_digest(one) for one in (part.part, part.bound, of_class.Mine)]

    first = digests(base, own)
    assert digests(base, own) == first
    part, bound, mine = digests(base, own.replace("RATE = 1", "RATE = 2"))
    assert (part != first[0], bound != first[1], mine) == (True, True, first[2])
    assert digests(base, own.replace("(part, 1)", "(part, 2)"))[1] != first[1]
    assert digests(base.replace("SIGN = 1", "SIGN = 2"), own)[2] != first[2]


def test_what_has_no_source_is_never_taken_for_another(monkeypatch):
    made: dict[str, Any] = {}
    exec("def one(): return 1", made)
    assert evaluation.source_digest(made["one"]) == evaluation.source_digest(made["one"])
    here = evaluation.source_digest(made["one"])
    exec("def other(): return 1", made)
    assert evaluation.source_digest(made["other"]) != here
    monkeypatch.setattr(registries, "THIS_PROCESS", "another")
    assert evaluation.source_digest(made["one"]) != here


# ---- progress ------------------------------------------------------------------------------------------------


def test_a_callback_is_told_of_each_step(pair):
    told: list[tuple[Any, ...]] = []
    with progress_to(lambda *now: told.append(now)):
        evaluate(pair[1], TOKENS, baseline=pair[0])
        with bar("tuning", None) as advance:
            advance(2, "loss 1.5")
    assert told[0] == ("perplexity", 0, 14, "")
    assert [now for now in told if now[0] == "perplexity"][-1] == ("perplexity", 14, 14, "")
    assert told[-2:] == [("tuning", 0, None, ""), ("tuning", 2, None, "loss 1.5")]
    with bar("searching", 1) as advance:
        advance()
    assert told[-1][0] == "tuning", "closed, nothing is told any more"


def test_callbacks_nest_and_each_thread_has_its_own():
    told: dict[str, list[float]] = {"outer": [], "inner": [], "other": []}

    def to(name: str) -> Any:
        return progress_to(lambda description, done, total, words: told[name].append(done))

    def work(steps: int) -> None:
        with bar("work", steps) as advance:
            advance(steps)

    def elsewhere() -> None:
        work(7)  # nobody listens here
        with to("other"):
            work(5)

    with to("outer"):
        with to("inner"):
            work(1)
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        work(2)
    assert told == {"outer": [0, 2], "inner": [0, 1], "other": [0, 5]}


def test_an_error_of_the_callback_stops_the_work():
    def stop(description: str, done: float, total: float | None, words: str) -> None:
        if done >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), progress_to(stop), bar("work", 5) as advance:
        advance(2)
    assert progress._callback.get() is None


def test_work_that_cannot_count_is_measured_only_where_somebody_listens(monkeypatch):
    monkeypatch.setattr(progress, "MEASURE_EVERY", 0.01)
    seen, asked = threading.Event(), []

    def measure() -> float:
        asked.append(threading.current_thread().name)
        return 3000.0

    with bar("saving", 4000, measure):
        pass
    assert not asked
    assert not any(thread.name == "layercut-progress" for thread in threading.enumerate())
    listening = progress_to(lambda *now: seen.set() if now == ("saving", 3000, 4000, "") else None)
    with listening, bar("saving", 4000, measure):
        assert seen.wait(10)
    assert set(asked) == {"layercut-progress"}
    assert not any(thread.name == "layercut-progress" for thread in threading.enumerate())
