"""How much the fold closes of a cut where layers normalise what they write, beside a family that does not.

    python research/stand_ins.py TEXT [--seconds 240] [--only NAME ...]

Trains a small Llama, Gemma-3 and OLMo-2 on the text, from one seed and for the same time, removes two layers at each
place and folds. Of the text the last tenth is never trained on: the fold is solved on the first half of that
and judged on the second. Writes research/results/stand_ins.json.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import common
from layercut.healing import fold_
from layercut.models.losses import mean_kl
from layercut.models.runner import DecoderRunner
from layercut.segments import Segment
from layercut.surgery import cut

VOCABULARY, LAYERS, WINDOW, BATCH = 512, 8, 128, 4
CUTS = [Segment(start, start + 2) for start in range(1, LAYERS - 1)]
RESULT = Path(__file__).resolve().parent / "results" / "stand_ins.json"
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512,
    "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "Llama": lambda: transformers.LlamaConfig(**SHAPE),
    "Gemma-3": lambda: transformers.Gemma3TextConfig(
        **SHAPE, query_pre_attn_scalar=64, sliding_window=64, hidden_activation="gelu_pytorch_tanh"
    ),
    "OLMo-2": lambda: transformers.Olmo2Config(**{k: v for k, v in SHAPE.items() if k != "head_dim"}),
}


def tokenized(path: Path) -> torch.Tensor:
    """Rows of token ids [N, WINDOW], of a byte-level BPE learnt from the text itself."""
    text = path.read_text(encoding="utf-8")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    learn = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<end>"], show_progress=False)
    tokenizer.train_from_iterator([text[: 2**21]], learn)
    ids = torch.tensor([i for each in text.split("\n\n\n") for i in [0, *tokenizer.encode(each).ids]])
    return ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)


def trained(config: Any, rows: torch.Tensor, seconds: float) -> tuple[Any, dict[str, Any]]:
    """A model trained for some seconds, and how."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.95))
    order, began, step, losses = torch.Generator().manual_seed(0), time.process_time(), 0, []
    while (gone := (time.process_time() - began) / seconds) < 1:
        batch = rows[torch.randint(len(rows), (BATCH,), generator=order)]
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * min(1.0, 0.05 + 2 * (1 - gone))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        step += 1
        if step % 100 == 0:
            print(
                f"  {step} steps, {time.process_time() - began:.0f} s, loss {sum(losses[-100:]) / 100:.3f}", flush=True
            )
    model.eval().requires_grad_(False)
    return model, {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": step * BATCH * WINDOW,
        "seconds of training": round(time.process_time() - began),
        "loss": round(sum(losses[-50:]) / len(losses[-50:]), 3),
    }


def healed(model: Any, fit: torch.Tensor, judged: torch.Tensor) -> list[dict[str, Any]]:
    """Each cut of two layers: KL on tokens never trained on, before and after the fold."""
    rows, dense = [], DecoderRunner(model)
    for segment in CUTS:
        student = cut(model, [segment])
        before = mean_kl(dense, DecoderRunner(student), judged)
        began = time.process_time()
        fold_(student, dense, fit, heldout=judged)
        seconds, after = time.process_time() - began, mean_kl(dense, DecoderRunner(student), judged)
        rows.append({"removed": str(segment), "cut": before, "folded": after, "seconds": round(seconds, 1)})
        print(f"  {segment}: KL {before:.4f} -> {after:.4f} ({1 - after / before:.0%}), {seconds:.0f} s", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--seconds", type=float, default=240, help="of training, of one processor, for each family")
    parser.add_argument("--only", nargs="*", choices=FAMILIES, help="these again; the others' figures stay")
    parser.add_argument("--models", type=Path, help="a folder that keeps the trained models, and has them already")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rows = tokenized(options.text)
    unseen = rows[len(rows) * 9 // 10 :]
    half = min(128, len(unseen) // 2)
    found = json.loads(RESULT.read_text())["families"] if RESULT.exists() else {}
    for name in options.only or FAMILIES:
        print(name, flush=True)
        kept = options.models / name if options.models else None
        if kept and kept.exists():
            model = transformers.AutoModelForCausalLM.from_pretrained(kept, dtype=torch.float32).eval()
            model.requires_grad_(False)
            how = json.loads((kept / "how.json").read_text())
        else:
            model, how = trained(FAMILIES[name](), rows[: len(rows) * 9 // 10], options.seconds)
            if kept:
                model.save_pretrained(kept)
                (kept / "how.json").write_text(json.dumps(how))
        cuts = healed(model, unseen[:half], unseen[half : half + 64])
        mean = math.exp(sum(math.log(each["folded"] / each["cut"]) for each in cuts) / len(cuts))
        found[name] = {**how, "cuts": cuts, "folded over cut": mean}
        print(f"  KL after the fold over KL after the cut: {mean:.3f}")
    result = {
        "date": time.strftime("%Y-%m-%d"), "text": options.text.name, "tokens to fold": half * WINDOW,
        "families": {name: found[name] for name in FAMILIES if name in found},
    }  # fmt: skip
    RESULT.write_text(common.compact(result), encoding="utf-8")


if __name__ == "__main__":
    main()
