"""auto-round in an environment of its own: a checkpoint and rows of tokens in, rounded weights as plain numbers out.

    python3 -m venv DIR && DIR/bin/pip install 'auto-round>=0.16,<0.17'
    python benchmarks/tune_quantized.py … --auto-round DIR/bin/python   # which runs this file with that interpreter

Every linear module of the decoder is rounded, symmetric; each group's scale and each weight's rounding are learned, a
layer at a time, on the rows of the file ROWS [rows, tokens], eight in a step.
"""

from __future__ import annotations

import argparse

import torch
from auto_round import AutoRound  # pyrefly: ignore
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("model", "rows", "out"):
        parser.add_argument(name)
    for name in ("--bits", "--group-size", "--iterations"):
        parser.add_argument(name, type=int, required=True)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    rows = torch.load(args.rows)
    peer = AutoRound(
        model, AutoTokenizer.from_pretrained(args.model), scheme=f"W{args.bits}A16", bits=args.bits,
        group_size=args.group_size, sym=True, iters=args.iterations, nsamples=len(rows), seqlen=rows.shape[1],
        dataset=torch.utils.data.DataLoader(rows, batch_size=8), device_map="cpu", amp=False,
    )  # fmt: skip
    rounded, _ = peer.quantize()
    weights = {n: p.detach().contiguous() for n, p in rounded.named_parameters() if p.dim() == 2 and ".layers." in n}
    save_file(weights, args.out)


if __name__ == "__main__":
    main()
