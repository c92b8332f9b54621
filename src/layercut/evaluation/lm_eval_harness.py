"""Tasks through lm-evaluation-harness, on models that are already in memory.

One record a task and model (its form: `retention.py`), kept as a file in the run folder under a key of everything it
depends on: what the model holds, the task's definition, the limit, the version of lm-eval. A run that was stopped
continues with the next task. lm-eval itself is an extra: `pip install 'layercut[eval]'`.

Each task is one call of `lm_eval.evaluator.evaluate`. `simple_evaluate` around it is not used: it describes the
machine after every call (`add_env_info`), which takes some 10 s, and would be called once a task and model, since a
record is kept as soon as a task is done; and it loads the tasks itself, while their definitions, which are part of
the record's key, must be known before. What it does to the tasks (few-shot number and seed) is done in `load_tasks`,
and random numbers are seeded as it does it (`_seeded`).
HFLM is subclassed for three reasons alone: its batch size is one number for all lengths, or found by running out of
memory, which a CPU does not survive; it computes the context of a question once for each of its choices
(`shared_contexts.py`); and its progress bar is not layercut's.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layercut.data.text_files import content
from layercut.distributed import sharding
from layercut.errors import ConfigError, DataError, first_line
from layercut.evaluation.shared_contexts import Answer, Request, log_likelihoods, requests_at_once, shares_contexts
from layercut.files.json_values import digest, restored, write_json
from layercut.models.loading import positions, quiet_transformers
from layercut.models.memory import ShrinkingParts, budget
from layercut.progress import bar
from layercut.registries import source_digest

Record = dict[str, Any]
LONGEST_ON_CPU = 2048
"""Tokens a request may have on a CPU; longer ones lose their beginning. A window of 8,192 takes a CPU minutes."""
MOST_ROWS = 32
"""Rows of a batch, where the logits leave room for so many."""
SEED = 1234  # lm-eval's own, for the choice of few-shot examples and of all that is drawn
NOT_THE_MODEL = ("_name_or_path", "transformers_version", "dtype", "original_layer_index", "architectures")
"""Keys of a config that say where a model came from, not what it computes."""


# --- what can be asked for ---------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def task_manager(names: tuple[str, ...], include_path: Path | None) -> Any:
    """lm-eval's index of tasks. Its own 14,000 take seconds to read: left out where `include_path` has all names."""
    with _quiet():
        try:
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise ConfigError(
                "--tasks needs lm-evaluation-harness, which is not installed",
                "pip install 'layercut[eval]', or in a checkout: pip install '.[eval]'",
            ) from None
        if include_path is not None and not include_path.is_dir():
            raise ConfigError(f"--include-path {include_path} is no folder", "name a folder with lm-eval's task files")
        folder = str(include_path) if include_path else None
        if folder:
            own = TaskManager(include_path=folder, include_defaults=False)
            if set(names) <= set(own.all_tasks):
                return own
        every = TaskManager(include_path=folder)
    unknown = [name for name in names if name not in set(every.all_tasks)]
    if unknown:
        near = [n for name in unknown for n in difflib.get_close_matches(name, every.all_tasks, 3)]
        raise ConfigError(
            f"lm-eval has no task {', '.join(map(repr, unknown))}",
            (f"did you mean {', '.join(dict.fromkeys(near))}? " if near else "")
            + "lm-eval ls tasks lists all; task files of your own: --include-path FOLDER",
        )
    return every


def check_tasks(names: Sequence[str], include_path: Path | None) -> None:
    """Refuse what cannot be scored, before anything long is begun."""
    task_manager(tuple(names), include_path)


def harness_version(include_path: Path | None) -> list[Any]:
    """What scores depend on beside model and limit: lm-eval, and what own task files hold, wherever they lie."""
    own: list[list[str]] = []
    if include_path is not None:
        files = sorted(p for p in include_path.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
        own = [[str(p.relative_to(include_path)), content(p)] for p in files]
    return [metadata.version("lm_eval"), own]


def load_tasks(names: Sequence[str], include_path: Path | None) -> dict[str, Any]:
    """The single tasks behind the names, groups and tags expanded."""
    manager = task_manager(tuple(names), include_path)
    found: dict[str, Any] = {}
    for name in dict.fromkeys(names):
        try:
            with _quiet(), _seeded():
                found |= manager.load([name])["tasks"]
        except Exception as error:  # datasets, the Hub, and the code of the task's author each have their own
            raise DataError(
                f"task {name!r} cannot be loaded: {first_line(error)}",
                "check the network; tasks with data of your own: --include-path FOLDER",
            ) from error
    for task in found.values():  # as lm_eval.simple_evaluate does it
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEED)
    return found


# --- scoring -----------------------------------------------------------------------------------------------------


def score_tasks(
    model: Any, tokenizer: Any, tasks: dict[str, Any], *, limit: int | None, name: str, cache: Path | None
) -> dict[str, Record]:
    """One record per task, from the cache where it is there. Neither model nor tokenizer is changed."""
    held = content_hash(model, tokenizer) if cache else ""
    lm, records = None, {}
    for task_name, task in tasks.items():
        longest = _longest(model)
        key = digest([held, task_name, definition(task, limit), limit, longest, metadata.version("lm_eval")])
        file = cache / f"{task_name.replace('/', '-')}-{key}.json" if cache else None
        record = _read(file)
        if record is None:
            lm = lm or language_model(model, tokenizer, longest)
            lm.title = f"{task_name}, {name}"
            record = _run(lm, task_name, task, limit)
            if file:
                file.parent.mkdir(exist_ok=True)
                write_json(file, record)
        records[task_name] = record
    return records


def _read(file: Path | None) -> Record | None:
    try:
        found = restored(json.loads(file.read_text(encoding="utf-8"))) if file else None
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def definition(task: Any, limit: int | None) -> str:
    """Hash of a task: what its YAML says, functions by how they are written, and the items that will be asked."""
    documents = list(islice(iter(task.eval_docs), limit))
    config = task.config.to_dict(keep_callable=True)
    if isinstance(facts := config.get("metadata"), dict):  # lm-eval notes where the file lay
        config["metadata"] = {key: value for key, value in facts.items() if key != "config_source"}
    said = json.dumps(
        [source_digest(type(task)), config, documents], sort_keys=True,
        default=lambda value: source_digest(value) if callable(value) else str(value),
    )  # fmt: skip
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _longest(model: Any) -> int:
    """Tokens a request may have: the model's own context, bounded on a CPU."""
    limit = positions(model.config) or LONGEST_ON_CPU
    return min(limit, LONGEST_ON_CPU) if next(model.parameters()).device.type == "cpu" else limit


def _run(lm: Any, name: str, task: Any, limit: int | None) -> Record:
    from lm_eval.evaluator import evaluate

    with _quiet(), _seeded():
        # no bootstrap: standard errors are computed from the items, and only for means
        results = evaluate(lm=lm, task_dict={"tasks": {name: task}, "groups": {}}, limit=limit, bootstrap_iters=0)
    return record_of(name, task, results)


def record_of(name: str, task: Any, results: dict[str, Any]) -> Record:
    """lm-eval's answer for one task, reduced to what is compared."""
    samples = results["samples"][name]
    better, metrics = results["higher_is_better"][name], {}
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
    first = samples[0]["filter"]
    items = [s for s in samples if s["filter"] == first]
    hashes = "".join(f"{s['doc_id']}:{s['doc_hash']}" for s in items)
    return {
        "task": name,
        "items": len(items),
        "document_hash": hashlib.sha256(hashes.encode()).hexdigest()[:16],
        "choices": _choices(task, items),
        "metrics": metrics,
        "version": results["versions"].get(name),
        "shots": results["n-shot"].get(name),
    }


def _choices(task: Any, items: Sequence[dict[str, Any]]) -> list[int] | None:
    """How many answers each item offers; None where the answer is not picked from a list."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    try:
        return [len(task.doc_to_choice(s["doc"])) for s in items]
    except (AttributeError, NotImplementedError):  # a task in plain Python: one request an answer
        return [len(s["arguments"]) for s in items]


def language_model(model: Any, tokenizer: Any, longest: int) -> Any:
    """The model as lm-eval wants it, with layercut's progress bar and bounded tensors of logits."""
    from lm_eval.models.huggingface import HFLM

    vocabulary, shares = model.config.get_text_config().vocab_size, shares_contexts(model)

    class LanguageModel(HFLM):
        """HFLM whose requests go through in slices, from the longest to the shortest."""

        title = ""

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: Any = None) -> Any:
            _check_answers(requests, self.title)
            if shares:
                return _answers(model, [_within(request[1], request[2], longest) for request in requests], self.title)

            def length(i: int) -> int:
                return min(longest, len(requests[i][1]) + len(requests[i][2]))

            answer = partial(super()._loglikelihood_tokens, disable_tqdm=True)
            # requests of one context stay together: lm-eval answers one-token choices of one context in one pass
            order = sorted(range(len(requests)), key=lambda i: (-length(i), requests[i][1], requests[i][2]))
            return self._in_slices(requests, order, length, answer)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            def length(i: int) -> int:
                return min(longest, len(requests[i].args[0]) // 2)  # about; characters are cheap to count

            answer = partial(super().generate_until, disable_tqdm=True)
            order = sorted(range(len(requests)), key=lambda i: -length(i))
            return self._in_slices(requests, order, length, answer)

        def _in_slices(self, requests: Any, order: list[int], length: Callable[[int], int], answer: Any) -> list[Any]:
            def rows_of(first: int) -> int:
                room = budget(next(model.parameters()).device)
                return min(MOST_ROWS, room.logit_rows(max(1, length(first)), vocabulary))

            def given(part: list[int], share: float) -> Any:
                self.batch_size_per_gpu = max(1, int(rows_of(part[0]) * share))
                return answer([requests[i] for i in part])

            return _in_slices(model, order, lambda first: 4 * rows_of(first), given, self.title)

    with _quiet():
        # a tokenizer of its own: lm-eval gives it a padding token, which must not get into what is exported
        return LanguageModel(
            pretrained=model, tokenizer=copy.deepcopy(tokenizer), max_length=longest, batch_size=1, backend="causal",
            softmax_dtype="float32",  # in bfloat16, probabilities of three digits make choices tie
        )  # fmt: skip


def _check_answers(requests: Sequence[Any], title: str) -> None:
    """Refuse an answer without a token."""
    if not all(request[2] for request in requests):
        raise DataError(
            f"{title}: an answer has no token of its own, since the tokenizer joins it to its question",
            "choose another task, or let its questions end with a blank line",
        )


def _answers(model: Any, requests: list[Request], title: str) -> list[Answer]:
    """As lm-eval answers them, from the longest context to the shortest, every one run once; with a progress bar."""
    order = sorted(range(len(requests)), key=lambda i: (-len(requests[i][0]), requests[i]))

    def most(first: int) -> int:
        return min(requests_at_once(len(requests[first][0])), budget(next(model.parameters()).device).most_rows)

    return _in_slices(
        model, order, most, lambda part, _: log_likelihoods(model, [requests[i] for i in part]), title
    )  # fmt: skip


def _in_slices(
    model: Any,
    order: list[int],
    most: Callable[[int], int],
    given: Callable[[list[int], float], Sequence[Any]],
    title: str,
) -> list[Any]:
    """Answers to numbered requests, a slice after the other; one that runs out of memory is taken again in halves."""
    answers: list[Any] = [None] * len(order)
    device, alone = next(model.parameters()).device, not sharding.is_spread(model)
    with bar(title, len(order)) as advance:
        while order:
            rows = most(order[0])
            part, order = order[:rows], order[rows:]
            queue = ShrinkingParts("evaluate", [part], device, alone=alone)
            for some in queue:
                with queue.trying(some):
                    for i, answer in zip(some, given(some, len(some) / len(part)), strict=True):
                        answers[i] = answer
                    advance(len(some))
    return answers


def _within(context: list[int], continuation: list[int], longest: int) -> Request:
    """A request of no more tokens than the model takes, cut as lm-eval cuts it: from the beginning."""
    kept = max(1, longest + 1 - len(continuation))
    return context[-kept:], continuation


# --- small things ------------------------------------------------------------------------------------------------


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
    """lm-eval's own log and bars and those of datasets, silenced; errors still raise."""
    import datasets
    from tqdm.std import tqdm

    begin = tqdm.__init__

    def hidden(bar: Any, *args: Any, **kwargs: Any) -> None:
        begin(bar, *args, **(kwargs | {"disable": True}))  # lm-eval has bars that no argument switches off

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    log, bars = logging.getLogger("lm_eval"), datasets.are_progress_bars_disabled()
    level = log.level
    log.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    tqdm.__init__ = hidden
    try:
        with quiet_transformers():
            yield
    finally:
        tqdm.__init__ = begin
        log.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
