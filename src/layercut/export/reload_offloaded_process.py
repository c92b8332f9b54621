"""Verify that a saved checkpoint is the model it should be, in a fresh process, run by `checkpoint.verify_streamed`.

For what does not fit in memory: the layers stay on disk. Prints what it does, a line a step, and then one line of
JSON, or fails with the difference as its last line.

    python -m layercut.export.reload_offloaded_process FOLDER EXPECTED.safetensors DEVICE DTYPE THREADS
"""

from __future__ import annotations

import json
import sys

import torch
from safetensors.torch import load_file

from layercut.models import checkpoints, layer_reader


@torch.no_grad()
def main(folder: str, expected: str, device: str, dtype: str, threads: str) -> None:
    """Open the folder, compare logits; prints what was found, or exits with the difference."""
    torch.set_num_threads(int(threads))
    reference = load_file(expected)
    print("step: opening", flush=True)
    model = layer_reader.open_on_disk(checkpoints.resolve(folder), dtype=dtype, device=device).model
    print("step: comparing logits", flush=True)
    got = model(input_ids=reference["tokens"].to(device), use_cache=False).logits.cpu()
    if not torch.equal(got, reference["logits"]):
        sys.exit(f"logits differ by up to {(got.float() - reference['logits'].float()).abs().max().item():g}")
    how = "with layers left on disk; not loaded whole, nothing generated"
    print(json.dumps({"logits": "equal to the bit", "cached_generation": None, "tokens": None, "how": how}))


if __name__ == "__main__":
    main(*sys.argv[1:])
