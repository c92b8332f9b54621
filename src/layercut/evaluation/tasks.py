"""Tasks of lm-evaluation-harness on models in memory, and how much of the dense model's scores a pruned model keeps.

A *record* is what one model made of one task, item by item:

    {"metrics": {"acc": {"values": [1.0, 0.0, …] or None, "score": 0.5, "higher_is_better": true}, …},
     "choices": [4, 4, 3, …] or None, "items": 100, "document_hash": "…"}

Each is a file in the run folder under a key of everything it depends on, so that a stopped run continues with the next
task. `lm_eval.evaluate` is called: `simple_evaluate` around it describes the machine for 10 s after every call.

Scores near chance flatter a broken model, so retention comes twice: score / dense score, and
(score - chance) / (dense score - chance), the latter of tasks on which the dense model does not guess. Models answer
the same items: errors come from samples of the items, drawn for all models together.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import logging
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layercut.data.documents import content
from layercut.distributed import sharding
from layercut.errors import ConfigError, DataError, RunError, first_line
from layercut.files import digest, restored, write_json
from layercut.models.decoder_stack import positions
from layercut.models.loading import quiet_transformers
from layercut.models.memory import ShrinkingParts, budget
from layercut.progress import bar
from layercut.registries import source_digest

Record = Mapping[str, Any]
LONGEST_ON_CPU = 2048
"""Tokens a request may have on a CPU; longer ones lose their beginning. A window of 8,192 takes a CPU minutes."""
MOST_ROWS = 32  # rows of a batch, where the logits leave room for so many
SEED = 1234  # lm-eval's own, for few-shot examples and all that is drawn
NOT_THE_MODEL = ("_name_or_path", "transformers_version", "dtype", "original_layer_index", "architectures")
"""Keys of a config that say where a model came from, not what it computes."""
PREFERRED = ("acc_norm", "acc", "exact_match")
"""Which metric represents a task: the first of these that it reports, else the first one where higher is better."""
ACCURACIES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")
"""Metrics by which guessing among n choices scores 1 / n."""
CLEAR = 2.0  # standard errors of guessing by which a score is above it, where it is no guessing
DRAWS, FEWEST = 2000, 20
"""Bootstrap samples of the items, and how many items have an error by them: few that agree would have none."""


@lru_cache(maxsize=1)
def check_tasks(names: tuple[str, ...], include_path: Path | None) -> Any:
    """lm-eval's index of tasks, with all these in it. Its own 14,000 take seconds to read: only where they are needed.

    What cannot be scored is refused before anything long is begun.
    """
    with _quiet():
        try:
            from lm_eval.tasks import TaskManager
        except ImportError:
            words = "--tasks needs lm-evaluation-harness, which is not installed"
            raise ConfigError(words, "pip install 'layercut[eval]', or in a checkout: pip install '.[eval]'") from None
        if include_path is not None and not include_path.is_dir():
            raise ConfigError(f"--include-path {include_path} is no folder", "name a folder with lm-eval's task files")
        folder = str(include_path) if include_path else None
        if folder:
            every = TaskManager(include_path=folder, include_defaults=False)
        if not folder or not {*names} <= {*every.all_tasks}:
            every = TaskManager(include_path=folder)
    if unknown := sorted({*names} - {*every.all_tasks}, key=names.index):
        near = dict.fromkeys(n for name in unknown for n in difflib.get_close_matches(name, every.all_tasks, 3))
        raise ConfigError(
            f"lm-eval has no task {', '.join(map(repr, unknown))}",
            (f"did you mean {', '.join(near)}? " if near else "")
            + "lm-eval ls tasks lists all; task files of your own: --include-path FOLDER",
        )
    return every


def harness_version(include_path: Path | None) -> list[Any]:
    """What scores depend on beside model and limit: lm-eval, and what own task files hold, wherever they lie."""
    files = sorted(include_path.rglob("*")) if include_path else []
    files = [p for p in files if p.is_file() and "__pycache__" not in p.parts]
    return [metadata.version("lm_eval"), [[str(p.relative_to(include_path or p)), content(p)] for p in files]]


def load_tasks(names: Sequence[str], include_path: Path | None) -> dict[str, Any]:
    """The single tasks behind the names, groups and tags expanded."""
    manager, found = check_tasks(tuple(names), include_path), dict[str, Any]()
    for name in dict.fromkeys(names):
        try:
            with _quiet(), _seeded():
                found |= manager.load([name])["tasks"]
        except Exception as error:  # datasets, the Hub, and the code of the task's author each have their own
            words = f"task {name!r} cannot be loaded: {first_line(error)}"
            raise DataError(words, "check the network; tasks with data of your own: --include-path FOLDER") from error
    for task in found.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEED)
    return found


# --- scoring ------------------------------------------------------------------------------------------------


def score_tasks(
    model: Any, tokenizer: Any, tasks: dict[str, Any], *, limit: int | None, name: str, cache: Path | None
) -> dict[str, Record]:
    """One record per task, from the cache where it is there. Neither model nor tokenizer is changed."""
    longest = positions(model.config) or LONGEST_ON_CPU
    if next(model.parameters()).device.type == "cpu":
        longest = min(longest, LONGEST_ON_CPU)
    held, lm, records = content_hash(model, tokenizer) if cache else "", None, dict[str, Record]()
    for task_name, task in tasks.items():
        file = None
        if cache:
            key = digest([held, task_name, definition(task, limit), limit, longest, metadata.version("lm_eval")])
            file = cache / f"{task_name.replace('/', '-')}-{key}.json"
        try:
            record = restored(json.loads(file.read_text(encoding="utf-8"))) if file else None
        except (OSError, ValueError):  # not there, or spoiled
            record = None
        if not isinstance(record, dict):
            lm = lm or language_model(model, tokenizer, longest)
            lm.title = f"{task_name}, {name}"
            record = _run(lm, task_name, task, limit)
            if file:
                file.parent.mkdir(exist_ok=True)
                write_json(file, record)
        records[task_name] = record
    return records


def definition(task: Any, limit: int | None) -> str:
    """Hash of a task: what its YAML says, functions by how they are written, and the items that will be asked."""
    config = task.config.to_dict(keep_callable=True)
    if isinstance(facts := config.get("metadata"), dict):  # lm-eval notes where the file lay
        config["metadata"] = {key: value for key, value in facts.items() if key != "config_source"}
    said = json.dumps(
        [source_digest(type(task)), config, list(islice(iter(task.eval_docs), limit))], sort_keys=True,
        default=lambda value: source_digest(value) if callable(value) else str(value),
    )  # fmt: skip
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def content_hash(model: Any, tokenizer: Any) -> str:
    """Hash of all weights and buffers, of both configs but for where they came from, and of the tokenizer."""
    seen = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        seen.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        seen.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    for config in filter(None, (model.config, getattr(model, "generation_config", None))):
        said = {k: v for k, v in config.to_dict().items() if k not in NOT_THE_MODEL}
        seen.update(json.dumps(said, sort_keys=True, default=str).encode())
    seen.update(json.dumps([tokenizer.special_tokens_map, tokenizer("a").input_ids], default=str).encode())
    core = getattr(tokenizer, "backend_tokenizer", None)
    seen.update((core.to_str() if core is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)).encode())
    return seen.hexdigest()[:16]


def _run(lm: Any, name: str, task: Any, limit: int | None) -> Record:
    """lm-eval's answer for one task, reduced to what is compared."""
    from lm_eval import evaluate

    with _quiet(), _seeded():
        # no bootstrap: standard errors are computed from the items, and only for means
        results = evaluate(lm=lm, task_dict={"tasks": {name: task}, "groups": {}}, limit=limit, bootstrap_iters=0)
    samples, better, metrics = results["samples"][name], results["higher_is_better"][name], dict[str, Any]()
    for key, score in results["results"][name].items():
        metric, _, which = key.partition(",")
        if not which or metric.endswith("_stderr") or not isinstance(score, int | float):
            continue
        values = [s[metric] for s in samples if s["filter"] == which and metric in s]
        numbers = [float(v) for v in values] if all(isinstance(v, int | float) for v in values) else []
        # only what is the mean of its items can be paired by item: not perplexity, nor a corpus's BLEU
        mean = bool(numbers) and math.isclose(math.fsum(numbers) / len(numbers), score, rel_tol=1e-6, abs_tol=1e-9)
        metrics[metric if which == "none" else key] = {
            "values": numbers if mean else None,
            "score": float(score),
            "higher_is_better": bool(better.get(metric, True)),
        }
    if not metrics:
        raise DataError(f"task {name!r} reports no number", "choose a task with a metric")
    items = [s for s in samples if s["filter"] == samples[0]["filter"]]
    choices = None
    if task.OUTPUT_TYPE == "multiple_choice":
        try:
            choices = [len(task.doc_to_choice(s["doc"])) for s in items]
        except (AttributeError, NotImplementedError):  # a task in plain Python: one request an answer
            choices = [len(s["arguments"]) for s in items]
    hashes = hashlib.sha256("".join(f"{s['doc_id']}:{s['doc_hash']}" for s in items).encode())
    return {
        "task": name,
        "items": len(items),
        "document_hash": hashes.hexdigest()[:16],
        "choices": choices,
        "metrics": metrics,
        "version": results["versions"].get(name),
        "shots": results["n-shot"].get(name),
    }


def language_model(model: Any, tokenizer: Any, longest: int) -> Any:
    """The model as lm-eval's HFLM, whose requests go through in slices, from the longest to the shortest.

    lm-eval has one batch size for all lengths, or finds one by running out of memory, which a CPU does not survive.
    """
    from lm_eval.models.huggingface import HFLM

    device, alone = next(model.parameters()).device, not sharding.is_spread(model)
    vocabulary = model.config.get_text_config().vocab_size

    class LanguageModel(HFLM):
        title = ""

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: Any = None) -> Any:
            if not all(answer for _, _, answer in requests):
                words = f"{self.title}: an answer has no token of its own, since the tokenizer joins it to its question"
                raise DataError(words, "choose another task, or let its questions end with a blank line")
            # those of one context stay together: lm-eval answers one-token choices of one context in one pass
            sizes = [(len(context) + len(answer), context, answer) for _, context, answer in requests]
            return self._in_slices(requests, sizes, super()._loglikelihood_tokens)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            sizes = [(len(request.args[0]) // 2,) for request in requests]  # about; characters are cheap to count
            return self._in_slices(requests, sizes, super().generate_until)

        def _in_slices(self, requests: Any, sizes: list[Any], answer: Callable[..., list[Any]]) -> list[Any]:
            found: list[Any] = [None] * len(requests)
            order = sorted(range(len(requests)), key=lambda i: (-sizes[i][0], *sizes[i][1:]))
            with bar(self.title, len(order)) as advance:
                while order:
                    fit = budget(device).logit_rows(max(1, min(longest, sizes[order[0]][0])), vocabulary)
                    rows = min(MOST_ROWS, fit)
                    part, order = order[: 4 * rows], order[4 * rows :]
                    for some in (queue := ShrinkingParts("evaluate", [part], device, alone=alone)):
                        with queue.trying(some):
                            self.batch_size_per_gpu = max(1, rows * len(some) // len(part))
                            answers = answer([requests[i] for i in some], disable_tqdm=True)
                            for i, each in zip(some, answers, strict=True):
                                found[i] = each
                            advance(len(some))
            return found

    with _quiet():
        # a tokenizer of its own: lm-eval gives it a padding token, which must not get into what is exported
        return LanguageModel(
            pretrained=model, tokenizer=copy.deepcopy(tokenizer), max_length=longest, batch_size=1, backend="causal",
            softmax_dtype="float32",  # in bfloat16, probabilities of three digits make choices tie
        )  # fmt: skip


@contextmanager
def _seeded() -> Iterator[None]:
    """Random numbers as `lm_eval.simple_evaluate` seeds them, the same for every model; then as they were."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        random.seed(0)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's log and all bars of tqdm, silenced; errors still raise."""
    from tqdm.std import tqdm

    begin = tqdm.__init__

    def hidden(bar: Any, *args: Any, **kwargs: Any) -> None:
        begin(bar, *args, **(kwargs | {"disable": True}))  # lm-eval has bars that no argument switches off

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.CRITICAL)
    tqdm.__init__ = hidden
    try:
        with quiet_transformers():
            yield
    finally:
        tqdm.__init__ = begin
        log.setLevel(level)


# --- one model beside the dense one -------------------------------------------------------------------------


def guessing(record: Record, metric: str) -> tuple[float, float]:
    """The score of guessing by a metric of a task, and the score above which a model does not guess.

    The first is the mean of 1 / n over the items, 0 where nothing is chosen from a list. The second is `CLEAR` standard
    errors above it, sqrt(sum of p (1 - p)) / N with p = 1 / n of each of the N items. An accuracy that is no share of
    right answers, as TruthfulQA's mass on all true ones, has another score of guessing, which is not known: no such
    score is above it.
    """
    choices = record["choices"] if metric.partition(",")[0] in ACCURACIES else None
    if not choices:
        return 0.0, 0.0
    if not {*(record["metrics"][metric]["values"] or [])} <= {0.0, 1.0}:
        return 0.0, math.inf
    guess = sum(1 / n for n in choices) / len(choices)
    return guess, guess + CLEAR * (math.sqrt(sum((1 - 1 / n) / n for n in choices)) / len(choices))


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean, from the sample variance; None for fewer than two values."""
    if (n := len(values)) < 2:
        return None
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided exact binomial p-value of McNemar's test: how likely so uneven a split of the flips is by chance."""
    n, tail, term = lost + gained, 1, 1  # term: n over k
    for k in range(min(lost, gained)):
        term = term * (n - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**n)  # whole numbers until the division: exact however many items


def representative_metric(record: Record) -> str:
    """The metric that represents a task; a name may carry a filter, as in "exact_match,strict-match"."""
    metrics, better = record["metrics"], [name for name, each in record["metrics"].items() if each["higher_is_better"]]
    preferred = [name for wanted in PREFERRED for name in metrics if name.partition(",")[0] == wanted]
    return [*preferred, *better, *metrics][0]


def check_items(task: str, record: Record, others: Iterable[Record]) -> None:
    """Refuse records of a task that are not of the same items."""
    if any((other["document_hash"], other["items"]) != (record["document_hash"], record["items"]) for other in others):
        words = f"models were not scored on the same items{f' of {task}' * bool(task)}"
        raise RunError(words, "run again with --force; if that does not help, the task draws its items at random")


def compare_records(dense: Record, compressed: Record) -> dict[str, Any]:
    """One task's row: both scores with standard errors, flips and p-value, retention; the other metrics beside it."""
    check_items(dense.get("task", ""), dense, [compressed])
    main, rows = representative_metric(dense), dict[str, dict[str, Any]]()
    for metric in dense["metrics"]:
        before, after = dense["metrics"][metric], compressed["metrics"][metric]
        (guess, clear), better = guessing(dense, metric), before["higher_is_better"]
        ours, theirs = before["values"], after["values"]
        paired, lost, gained = ours is not None and theirs is not None, None, None
        if paired and {*ours, *theirs} <= {0.0, 1.0}:  # items that went from right to wrong, and from wrong to right
            lost, gained = (sum(a > b for a, b in zip(*each, strict=True)) for each in ((ours, theirs), (theirs, ours)))
        above = better and before["score"] > clear
        rows[metric] = {
            "chance": guess,
            "dense": before["score"],
            "dense_stderr": standard_error(ours) if paired else None,
            "compressed": after["score"],
            "compressed_stderr": standard_error(theirs) if paired else None,
            "lost": lost,
            "gained": gained,
            "p_value": None if lost is None or gained is None else mcnemar(lost, gained),
            "retention": after["score"] / before["score"] if better and before["score"] > 0 else None,
            "retention_above_chance": (after["score"] - guess) / (before["score"] - guess) if above else None,
            "higher_is_better": better,
        }
    return {"metric": main, "items": dense["items"], **rows.pop(main), "others": rows}


def compare_tasks(dense: Mapping[str, Record], compressed: Mapping[str, Record]) -> dict[str, Any]:
    """Compare the records of two models, task by task, and over all tasks.

    "retention" has the means over "tasks" and "items" of score / dense ("mean", with its standard "error" over the
    items), and over "tasks_above_chance" of the share above guessing; null where none counts.
    """
    rows = {name: compare_records(dense[name], compressed[name]) for name in dense}
    plain = [row["retention"] for row in rows.values() if row["retention"] is not None]
    above = [row["retention_above_chance"] for row in rows.values() if row["retention_above_chance"] is not None]
    over_all = {
        "mean": math.fsum(plain) / len(plain) if plain else None,
        "error": retained(dense, {"": compressed})[""].error,
        "above_chance": math.fsum(above) / len(above) if above else None,
        "tasks": len(plain),
        "tasks_above_chance": len(above),
        "items": sum(row["items"] for row in rows.values() if row["retention"] is not None),
    }
    return {"tasks": rows, "retention": over_all}


# --- several models, with paired errors ---------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Retained:
    """What one of several models retains; None where no task counts, or where it is the first itself."""

    mean: float | None  # mean over tasks of score / dense score
    error: float | None
    """Its standard error over the items; None of too few, or of a score that is no mean of its items, such as BLEU."""
    above_chance: float | None
    """Mean of (score - chance) / (dense score - chance) over the tasks on which the dense model does not guess."""
    above_chance_error: float | None
    behind: float | None = None  # the first model's mean less this one's
    behind_error: float | None = None
    p_value: float | None = None
    """How often so large a difference, either way, has the other sign in the samples; two-sided, and not below what a
    sign test could give on as many items as the two models were scored differently on."""


def retained(
    dense: Mapping[str, Record], models: Mapping[str, Mapping[str, Record]], *, draws: int = DRAWS, seed: int = 0
) -> dict[str, Retained]:
    """What each model retains, and how far it is behind the first of them."""
    names, generator = list(models), np.random.default_rng(seed)
    shares, above, counted = list[tuple[Any, Any]](), list[tuple[Any, Any]](), [0, 0]
    apart = np.zeros(len(names))

    def over(above: np.ndarray, below: np.ndarray) -> np.ndarray:  # NaN where the dense sample is not above the floor
        return np.where(below > 0, above / np.where(below > 0, below, 1), np.nan)

    for task, record in dense.items():
        of_models = [models[name][task] for name in names]
        check_items(task, record, of_models)
        metric = representative_metric(record)
        of_metric = [each["metrics"][metric] for each in (record, *of_models)]
        points = np.array([each["score"] for each in of_metric], dtype=float)  # [1 + M]
        samples, differ = np.full((draws, len(points)), np.nan), np.zeros(len(names))
        if all(each["values"] is not None for each in of_metric):
            values = np.array([each["values"] for each in of_metric], dtype=float)  # [1 + M, items]
            items = values.shape[1]
            counts = generator.multinomial(items, np.full(items, 1 / items), size=draws)
            samples, differ = counts @ values.T / items, (values[1:] != values[1]).sum(axis=1)
        floor, clear = guessing(record, metric)
        if not of_metric[0]["higher_is_better"]:
            continue  # of a perplexity nothing is retained
        if points[0] > 0:
            apart += differ
            counted[0] += record["items"]
            shares.append((points[1:] / points[0], over(samples[:, 1:], samples[:, :1])))
        if points[0] > clear:
            counted[1] += record["items"]
            point = (points[1:] - floor) / (points[0] - floor)
            above.append((point, over(samples[:, 1:] - floor, samples[:, :1] - floor)))
    nothing = (np.full(len(names), np.nan), np.full((draws, len(names)), np.nan))
    (mean, drawn), (mean_above, drawn_above) = (
        tuple(np.mean(each, axis=0) for each in zip(*parts, strict=True)) if parts else nothing
        for parts in (shares, above)
    )
    found = dict[str, Retained]()
    for i, name in enumerate(names):
        difference, behind, p_value = drawn[:, 0] - drawn[:, i], _known(mean[0] - mean[i]), None
        if len(known := difference[np.isfinite(difference)]):
            tail = min(np.mean(known <= 0), np.mean(known >= 0))
            p_value = min(1.0, 2 * max(float(tail), 1 / len(known), 0.5 ** apart[i]))
        found[name] = Retained(
            mean=_known(mean[i]), error=_spread(drawn[:, i], counted[0]), above_chance=_known(mean_above[i]),
            above_chance_error=_spread(drawn_above[:, i], counted[1]), behind=behind if i else None,
            behind_error=_spread(difference, counted[0]) if i else None, p_value=p_value if i else None,
        )  # fmt: skip
    return found


def _spread(samples: np.ndarray, items: int) -> float | None:
    """Half of the central 68 % of the samples: the standard deviation where they are normal, and not ruled by tails."""
    known = samples[np.isfinite(samples)]
    if len(known) < 2 or items < FEWEST:
        return None
    low, high = np.percentile(known, [15.865, 84.135])
    return float(high - low) / 2


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
