"""Seconds from a wrong command to its error, by wall clock and by processor: `python research/misuse.py MODEL_FOLDER`.

MODEL_FOLDER holds any small model of 8 layers with safetensors and tokenizer. Each command is a process of its own, run three times; the
median is written to research/results/misuse.json, and a table is printed.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMPRESS = {
    "no such folder": "compress ./nowhere --ratio 0.2",
    "no such .gguf file": "compress ./nowhere.gguf --ratio 0.2",
    "an empty folder": "compress empty --ratio 0.2",
    "a .gguf file that is none": "compress some.gguf --ratio 0.2",
    "no such text": "compress MODEL --ratio 0.2 --data nowhere.txt",
    "no such held-out text": "compress MODEL --ratio 0.2 --data good.txt --eval-data nowhere.txt",
    "no such tuning text": "compress MODEL --ratio 0.2 --data good.txt --tune-data nowhere.jsonl",
    "a pattern without a match": "compress MODEL --ratio 0.2 --data '*.parquet'",
    "an empty text": "compress MODEL --ratio 0.2 --data empty.txt",
    "a blank text": "compress MODEL --ratio 0.2 --data blank.txt",
    "a binary text": "compress MODEL --ratio 0.2 --data binary.txt",
    "a text in Latin-1": "compress MODEL --ratio 0.2 --data latin.txt",
    "too little text": "compress MODEL --ratio 0.2 --data good.txt --tokens 9000000",
    "too little held-out text": "compress MODEL --ratio 0.2 --data good.txt --eval-data other.txt --eval-tokens 9000000",
    "too little tuning text": "compress MODEL --ratio 0.2 --data good.txt --tune-data short.txt --tune-tokens 90000",
    "one part of a mix is missing": "compress MODEL --ratio 0.2 --data good.txt+nowhere.txt",
    "a Hub set without the Hub": "compress MODEL --ratio 0.2 --data good.txt --eval-data c4",
    "a run folder in use": "compress MODEL --ratio 0.2 --data good.txt --eval-data other.txt --out held",
    "the run of a file in use": "compress MODEL --ratio 0.2 --data good.txt --eval-data other.txt --out held.gguf",
    "searched and reported on": "compress MODEL --ratio 0.2 --data good.txt --eval-data good.txt",
    "nothing to remove": "compress MODEL --data good.txt --eval-data other.txt",
    "two things to remove": "compress MODEL --ratio 0.2 --segment 3:5",
    "a ratio above 1": "compress MODEL --ratio 20",
    "a ratio of 0": "compress MODEL --ratio 0",
    "a ratio that is a word": "compress MODEL --ratio fifth",
    "a segment beyond the stack": "compress MODEL --segment 20:30",
    "a segment backwards": "compress MODEL --segment 5:3",
    "a segment that is no segment": "compress MODEL --segment 3",
    "no such method": "compress MODEL --ratio 0.2 --method magic",
    "no such flag": "compress MODEL --ration 0.2",
    "no such command": "compres MODEL --ratio 0.2",
    "a window of 0": "compress MODEL --ratio 0.2 --window 0",
    "a window beyond the model's": "compress MODEL --ratio 0.2 --data good.txt --eval-data other.txt --window 9000",
    "no such engine": "compress MODEL --ratio 0.2 --for vlm",
    "no such device": "compress MODEL --ratio 0.2 --data good.txt --eval-data other.txt --device abacus",
    "bits that there are not": "compress MODEL --ratio 0.2 --bits 5",
    "a size that is none": "compress MODEL --target-size small",
    "a file in the run folder's place": "compress MODEL --ratio 0.2 --data good.txt --eval-data other.txt --out good.txt",
    "no such config file": "compress MODEL --config nowhere.yaml",
    "an unknown key in a config file": "compress MODEL --config wrong.yaml",
    "a run that is none": "evaluate empty --tasks piqa",
    "an export of no run": "export empty --out x.gguf",
}
CONTENTS = {"empty.txt": b"", "blank.txt": b"\n \n", "binary.txt": b"text\0text" * 300, "short.txt": b"few words",
            "latin.txt": b"caf\xe9 " * 400, "some.gguf": b"no GGUF", "wrong.yaml": b"ration: 0.2\n"}  # fmt: skip


def main() -> None:
    model, found = Path(sys.argv[1]).resolve(), {}
    with tempfile.TemporaryDirectory() as place:
        for name, content in CONTENTS.items():
            Path(place, name).write_bytes(content)
        for name, word in {"good.txt": "one", "other.txt": "two"}.items():
            Path(place, name).write_text("\n\n\n".join(f"{word} {i} of many words here" for i in range(4000)))
        held = []
        for name in ("held", "held.gguf-run", "empty"):
            Path(place, name).mkdir()
            if name != "empty":
                held.append(Path(place, name, ".lock").open("w"))
                fcntl.flock(held[-1], fcntl.LOCK_EX)
        for name, words in COMPRESS.items():
            command = [sys.executable, "-m", "layercut.cli", *words.replace("'", "").replace("MODEL", str(model)).split()]
            took: list[tuple[float, float]] = []
            for _ in range(3):
                begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
                done = subprocess.run(command, cwd=place, capture_output=True, text=True, env=os.environ)
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                took.append((time.perf_counter() - begun, spent))
            wall, cpu = (round(statistics.median(column), 2) for column in zip(*took, strict=True))
            says = next((line for line in done.stderr.splitlines() if line.startswith("error")), done.stderr[-200:])
            found[name] = {"command": words, "exit": done.returncode, "seconds": wall, "cpu_seconds": cpu, "error": says}
            print(f"| {name} | {done.returncode} | {wall:.2f} | {cpu:.2f} | {says[:90]} |", flush=True)
    out = Path(__file__).parent / "results" / "misuse.json"
    out.write_text(json.dumps(found, indent=1).replace(str(model), "MODEL").replace(place, "."))


if __name__ == "__main__":
    main()
