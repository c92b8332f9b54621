"""Tasks of lm-evaluation-harness, on models that are already in memory.

One record a task and model (its form: `retention.py`), kept as a file in the run folder under a key of everything it
depends on: what the model holds, the task's definition, the limit, the version of lm-eval. A run that was stopped
continues with the next task. lm-eval itself is an extra: `pip install 'layercut[eval]'`.

Each task is one call of `lm_eval.evaluate`. `simple_evaluate` around it describes the machine after every call, which
takes some 10 s; what else it does, few-shot number and seeds, is done here.
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
from functools import lru_cache
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layercut.data.documents import content
from layercut.distributed import sharding
from layercut.errors import ConfigError, DataError, first_line
from layercut.files import digest, restored, write_json
from layercut.models.decoder_stack import positions
from layercut.models.loading import quiet_transformers
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


@lru_cache(maxsize=1)
def check_tasks(names: tuple[str, ...], include_path: Path | None) -> Any:
    """lm-eval's index of tasks, with all these in it. Its own 14,000 take seconds to read: only where they are needed.

    What cannot be scored is refused before anything long is begun.
    """
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
    known = set(every.all_tasks)
    if unknown := [name for name in names if name not in known]:
        near = dict.fromkeys(n for name in unknown for n in difflib.get_close_matches(name, every.all_tasks, 3))
        raise ConfigError(
            f"lm-eval has no task {', '.join(map(repr, unknown))}",
            (f"did you mean {', '.join(near)}? " if near else "")
            + "lm-eval ls tasks lists all; task files of your own: --include-path FOLDER",
        )
    return every


def harness_version(include_path: Path | None) -> list[Any]:
    """What scores depend on beside model and limit: lm-eval, and what own task files hold, wherever they lie."""
    own: list[list[str]] = []
    if include_path is not None:
        files = sorted(p for p in include_path.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
        own = [[str(p.relative_to(include_path)), content(p)] for p in files]
    return [metadata.version("lm_eval"), own]


def load_tasks(names: Sequence[str], include_path: Path | None) -> dict[str, Any]:
    """The single tasks behind the names, groups and tags expanded."""
    manager, found = check_tasks(tuple(names), include_path), dict[str, Any]()
    for name in dict.fromkeys(names):
        try:
            with _quiet(), _seeded():
                found |= manager.load([name])["tasks"]
        except Exception as error:  # datasets, the Hub, and the code of the task's author each have their own
            raise DataError(
                f"task {name!r} cannot be loaded: {first_line(error)}",
                "check the network; tasks with data of your own: --include-path FOLDER",
            ) from error
    for task in found.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEED)
    return found


# --- scoring -----------------------------------------------------------------------------------------------------


def score_tasks(
    model: Any, tokenizer: Any, tasks: dict[str, Any], *, limit: int | None, name: str, cache: Path | None
) -> dict[str, Record]:
    """One record per task, from the cache where it is there. Neither model nor tokenizer is changed."""
    longest = positions(model.config) or LONGEST_ON_CPU
    if next(model.parameters()).device.type == "cpu":
        longest = min(longest, LONGEST_ON_CPU)
    held = content_hash(model, tokenizer) if cache else ""
    lm, records = None, dict[str, Record]()
    for task_name, task in tasks.items():
        key = digest([held, task_name, definition(task, limit), limit, longest, metadata.version("lm_eval")])
        file = cache / f"{task_name.replace('/', '-')}-{key}.json" if cache else None
        record = _kept(file)
        if record is None:
            lm = lm or language_model(model, tokenizer, longest)
            lm.title = f"{task_name}, {name}"
            record = _run(lm, task_name, task, limit)
            if file:
                file.parent.mkdir(exist_ok=True)
                write_json(file, record)
        records[task_name] = record
    return records


def _kept(file: Path | None) -> Record | None:
    try:
        found = restored(json.loads(file.read_text(encoding="utf-8"))) if file else None
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


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
    hashes = "".join(f"{s['doc_id']}:{s['doc_hash']}" for s in items)
    return {
        "task": name,
        "items": len(items),
        "document_hash": hashlib.sha256(hashes.encode()).hexdigest()[:16],
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
                raise DataError(
                    f"{self.title}: an answer has no token of its own, since the tokenizer joins it to its question",
                    "choose another task, or let its questions end with a blank line",
                )
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
