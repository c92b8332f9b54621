"""The lines of docs/after-layercut.md are run on a pruned folder, by the libraries alone; skipped where one is missing.

vLLM has `make test-engines ENGINES=vllm`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import folders
from layercut import surgery
from layercut.export import save

PAGE = Path(__file__).parents[2] / "docs" / "after-layercut.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
START, TRAIN, LORA, DISTIL, ROUND = BLOCKS


@pytest.fixture(scope="module")
def pruned(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("after")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    save(surgery.cut(model, ["3:5"]), AutoTokenizer.from_pretrained(tiny_model), folder / "small")
    documents = folders.prose(5, documents=8, words=30).split("\n\n\n")
    (folder / "mytext.txt").write_text("\n\n".join(documents))
    return folder


def run(pruned, dense, monkeypatch, *blocks):
    """What the lines leave behind, of two steps; layercut may not be imported by them."""
    few = {"runs/mine/model": str(pruned / "small"), "HuggingFaceTB/SmolLM2-135M-Instruct": str(dense),
           "size=8,": "size=2, use_cpu=True, max_steps=2, report_to=[],", "max_length=1024": "max_length=32",
           "bf16=False": "bf16=False, use_cpu=True, max_steps=2, report_to=[]", "length=128": "length=4"}  # fmt: skip
    monkeypatch.chdir(pruned)
    names: dict = {}
    with monkeypatch.context() as without:
        for module in [name for name in sys.modules if name.partition(".")[0] == "layercut"]:
            without.setitem(sys.modules, module, None)
        for block in blocks:
            for shown, tiny in few.items():
                block = block.replace(shown, tiny)
            exec(block, names)
    return names


def logits(folder):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(torch.arange(9)[None]).logits


@pytest.mark.parametrize(
    ("block", "package", "left"),
    [(TRAIN, "transformers", "trained"), (TRAIN + LORA, "peft", "merged"), (DISTIL, "trl", "distilled"),
     (ROUND, "llmcompressor", "int8")],
    ids=["Trainer", "peft", "TRL", "llm-compressor"],
)  # fmt: skip
def test_a_pruned_folder_goes_on(block, package, left, pruned, tiny_model, monkeypatch):
    pytest.importorskip(package, reason=f"{package} is not installed")
    names = run(pruned, tiny_model, monkeypatch, START, block)
    assert names["small"].config.original_layer_index == [0, 1, 2, 5, 6, 7]
    assert not torch.equal(logits(pruned / left), logits(pruned / "small"))
