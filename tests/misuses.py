"""What a user can get wrong, as commands, each with words that its `error:` or its `hint:` must hold, parted by |.

As a script it runs commands in one process and says of each what it imported; research/misuse.py times them.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

HEAVY = ("torch", "transformers", "datasets", "pyarrow", "lm_eval")
USUAL = [
    "--tokens=64", "--window=16", "--tune-tokens=64", "--eval-tokens=64", "--no-speed", "--data={text}",
    "--eval-data={heldout}", "--out={tmp}/run",
]  # fmt: skip
"""Flags with which `compress {model} --ratio=0.25` works; added to commands that do not give them."""
EARLY = {
    # the model
    "compress ./nowhere --ratio=0.2": "./nowhere|neither a folder nor a .gguf file|Hub id",
    "compress nowhere.gguf --ratio=0.2": "no file 'nowhere.gguf'|check the path",
    "compress {text} --ratio=0.2": "calibration.txt|not a GGUF file|config.json",
    "compress {tmp}/not.gguf --ratio=0.2": "not a GGUF file|starts with b'this'",
    "compress {tmp}/empty.gguf --ratio=0.2": "not a GGUF file",
    "compress {tmp}/empty --ratio=0.2": "no file|config.json",
    "compress {tmp} --ratio=0.2": "holds 3 .gguf files|give one",
    # what to remove
    "compress {model}": "neither --ratio nor --segment|--ratio 0.2",
    "compress {model} --ratio=0.2 --segment=1:2": "both --ratio and --segment|one of them",
    "compress {model} --ratio=0": "--ratio 0 is not between 0 and 1|--ratio 0.2",
    "compress {model} --ratio=20": "not between 0 and 1",
    "compress {model} --ratio=-0.5": "--ratio -0.5 is not between 0 and 1",
    "compress {model} --ratio=nan": "--ratio nan is not between 0 and 1",
    "compress {model} --ratio=0.01": "8 layers|--ratio 0.125",
    "compress {model} --ratio=0.99": "8 layers|1 to 7",
    "compress {model} --ratio=lots": "--ratio|lots|float",
    "compress {model} --segment=3": "'3'|START:STOP|--segment 13:19",
    "compress {model} --segment=a:b": "'a:b'|whole numbers",
    "compress {model} --segment=5:3": "5:3|START < STOP",
    "compress {model} --segment=-1:2": "-1:2|negative",
    "compress {model} --segment=6:20": "6:20|8 layers|0:8",
    "compress {model} --segment=1:4 --segment=3:6": "1:4 and 3:6 overlap|--segment 1:6",
    "compress {model} --segment=0:8": "all 8 layers|keep at least one",
    "compress {model} --target-size=small": "is no size|MB",
    "compress {model} --ratio=0.2 --method=guess": "--method|guess|fisher",
    "compress {model} --ratio=0.2 --preserve=sense": "'sense'|recall",
    "compare {model}": "--ratio",
    # other flags
    "compress {model} --ratoi=0.2": "--ratoi|Did you mean|--ratio",
    "compres {model} --ratio=0.2": "compres|Did you mean|compress",
    "search --ratio=0.2": "model|requires|layercut search --help",
    "compress {model} --ratio=0.2 --group-size=32": "--group-size is given, but nothing is quantized",
    "compress {model} --ratio=0.2 --bits=5": "--bits",
    "compress {model} --ratio=0.2 --bits=4 --bits-allowed=8": "--bits-allowed|--bits auto",
    "compress {model} --ratio=0.2 --probe-share=0.0004": "--probe-share 0.0004|0.001 to 0.999",
    "compress {model} --ratio=0.2 --tokens=many": "--tokens|many|int",
    "compress {model} --ratio=0.2 --tokens=0": "--tokens 0 is too small|1 or more",
    "compress {model} --ratio=0.2 --window=2": "--window 2 is too small|8 or more",
    "compress {model} --ratio=0.2 --window=256": "--window 256|128 positions|--window 128",
    "compress {model} --ratio=0.2 --eval-window=256": "--eval-window 128",
    "compress {model} --ratio=0.2 --tune-tokens=-1": "--tune-tokens -1 is too small",
    "compress {model} --ratio=0.2 --learning-rate=7": "--learning-rate 7 is outside 0 to 1|1e-4",
    "compress {model} --ratio=0.2 --objective=mse": "--objective|mse|next-token",
    "compress {model} --ratio=0.2 --dtype=int3": "--dtype|int3|bfloat16",
    "compress {model} --ratio=0.2 --long-context=1": "--long-context 1|2 and more",
    "compress {model} --ratio=0.2 --for=vlm": "vlm|--for vllm",
    "compress {model} --ratio=0.2 --device=abacus": "abacus|cpu, cuda",
    # the config file
    "compress {model} --config={tmp}/nowhere.yaml": "nowhere.yaml|cannot be read|No such file",
    "compress {model} --config={tmp}": "cannot be read|directory",
    "compress {model} --config": "--config names no file|run.yaml",
    "compress {model} --config={tmp}/not.yaml": "not.yaml|is not YAML",
    "compress {model} --config={tmp}/list.yaml": "list.yaml|does not hold keys|ratio: 0.2",
    "compress {model} --config={tmp}/unknown.yaml": "'ratoi'|unknown.yaml|did you mean 'ratio'",
    "compress {model} --config={tmp}/wrong.yaml": "learning|fast|wrong.yaml",
    # texts
    "compress {model} --ratio=0.2 --data=nowhere.txt": "--data: no file|--data python-docstrings",
    "compress {model} --ratio=0.2 --eval-data={tmp}/nowhere.txt": "--eval-data: no file|--eval-data python-docs",
    "compress {model} --ratio=0.2 --tune-data=nowhere.jsonl": "--tune-data: no file",
    "compress {model} --ratio=0.2 --data=wikitxt": "--data: no source|wikitxt",
    "compress {model} --ratio=0.2 --data={tmp}/empty": '--data|a folder|/empty/*.jsonl"',
    "compress {model} --ratio=0.2 --eval-data={tmp}/*.parquet": "--eval-data|no file matches",
    "compress {model} --ratio=0.2 --eval-data={tmp}/empty.txt": "--eval-data",
    "compress {model} --ratio=0.2 --data={tmp}/blank.txt": "--data",
    "compress {model} --ratio=0.2 --data={tmp}/binary.txt": "--data",
    "compress {model} --ratio=0.2 --tune-data={tmp}/latin.txt": "--tune-data|iconv",
    "compress {model} --ratio=0.2 --eval-data={tmp}/closed.txt": "--eval-data|cannot be read",
    "compress {model} --ratio=0.2 --tokens=9000000": "--tokens",
    "compress {model} --ratio=0.2 --eval-tokens=9000000": "--eval-tokens",
    "compress {model} --ratio=0.2 --tune-data={tmp}/short.txt --tune-tokens=900": "--tune-tokens",
    "compress {model} --ratio=0.2 --data={text}+nowhere.txt": "--data: no file 'nowhere.txt'",
    "compress {model} --ratio=0.2 --eval-data=c4": "--eval-data c4|--eval-data FILE.txt",
    "compress {model} --ratio=0.2 --eval-data={text}": "calibration.txt|reported on|--eval-data",
    "compress {model} --ratio=0.2 --eval-data={tmp}/link.txt": "calibration.txt|reported on|--eval-data",
    "compress {model} --ratio=0.2 --tune-data={heldout}": "evaluation.txt|tuned on|--eval-data",
    "evaluate {model} --eval-data=nowhere.txt": "--eval-data: no file 'nowhere.txt'",
    # the run folder
    "compress {model} --ratio=0.2 --out={tmp}/held": "{tmp}/held",
    "compress {model} --ratio=0.2 --out={tmp}/held.gguf": "held.gguf-run",
    "compress {model} --ratio=0.2 --out={text}": "--out {text} is a file",
    "compress {model} --ratio=0.2 --out={tmp}": "not empty|no layercut run",
    "compress {model} --ratio=0.2 --out={text}/run": "cannot be written|Not a directory",
    # other commands
    "evaluate ./nowhere": "./nowhere|neither a folder",
    "evaluate {tmp}/empty --tasks=piqa": "no file|config.json",
    "cut {model} --out={tmp}/run": "--segment|layercut cut --help",
    "cut {model} --segment=3:5": "--out|layercut cut --help",
    "cut {model} --segment=3:99 --out={tmp}/run": "3:99|8 layers",
    "cut {model} --segment=3:5 --out={tmp}": "exist|--force",
    "quantize {model} --out={tmp}/run": "no --bits|--bits 4",
    "quantize {tmp}/nowhere --bits=4 --out={tmp}/run": "no model|nowhere",
    "report {tmp}/nowhere": "nowhere|layercut compress",
    "report {model}": "no summary.json|layercut compress",
    "report {tmp} --ratio=1": "--ratio|layercut report --help",
}
"""Those that are refused before anything is imported that takes seconds."""
WITHOUT = {
    "compress {model} --ratio=0.2 --bits=4": ("compressed_tensors", "layercut[quantize]"),
    "compress {model} --ratio=0.2 --tasks=piqa": ("lm_eval", "layercut[eval]"),
    "compress {model} --ratio=0.2 --gguf-type=q4_k_m --out={tmp}/x.gguf": ("llama_cpp_py_sync", "layercut[gguf]"),
    "compress {tmp}/some.gguf --ratio=0.2": ("gguf", "layercut[gguf]"),
    "compress {model} --ratio=0.2 --out={tmp}/full": ("a free disk", "--out {tmp}/full"),
}
"""Likewise, where something is missing."""
LATER = {
    "compress {model} --ratio=0.2 --data={tmp}/broken.jsonl": "line 2|not JSON",
    "compress {model} --ratio=0.2 --data={tmp}/rows.jsonl:body": "no field 'body'|text",
    "compress {model} --ratio=0.2 --out=/proc/run": "cannot be written|--out",
}
"""What takes the tokenizer, the text, torch or the run folder to see; no weights are loaded."""


def argv(command: str, names: Mapping[str, object]) -> list[str]:
    words = command.split()
    given = {word.partition("=")[0] for word in words}
    usual = [flag for flag in USUAL if flag.partition("=")[0] not in given] if words[0].startswith("compres") else []
    return [word.format_map(names) for word in (*words, *usual)]


@contextlib.contextmanager
def litter(place: Path, text: Path) -> Iterator[None]:
    """Files for the commands to stumble over, and run folders that are in use."""
    for name, content in {
        "not.gguf": b"this is no GGUF", "empty.gguf": b"", "some.gguf": b"GGUF\3" + bytes(19),
        "empty.txt": b"", "blank.txt": b"\n \n",
        "binary.txt": b"text\0text" * 300, "short.txt": b"few words", "latin.txt": b"caf\xe9 " * 400,
        "broken.jsonl": b'{"text": "fine"}\n{"text":\n', "rows.jsonl": b'{"text": "fine"}\n',
        "not.yaml": b"ratio: [0.2", "list.yaml": b"- ratio", "unknown.yaml": b"ratoi: 0.2\n",
        "wrong.yaml": b"ratio: 0.2\nlearning_rate: fast\n",
    }.items():  # fmt: skip
        (place / name).write_bytes(content)
    (place / "link.txt").symlink_to(text)
    (place / "closed.txt").symlink_to("/proc/self/mem")  # which even root cannot read from its beginning
    (place / "empty").mkdir()
    with contextlib.ExitStack() as held:
        for name in ("held", "held.gguf-run"):
            (place / name).mkdir()
            fcntl.flock(held.enter_context((place / name / ".lock").open("w")), fcntl.LOCK_EX)
        yield


def main() -> None:
    """Read [missing, argv] line by line; print for each the exit code, stderr and what of HEAVY was imported."""
    from layercut.cli.command_line import main

    disk, real = shutil.disk_usage, sys.stdout
    modules: dict[str, Any] = sys.modules
    for line in sys.stdin:
        missing, words = json.loads(line)
        before, absent = {*modules}, modules.get(missing)
        free = 1000 if missing == "a free disk" else 1 << 60
        shutil.disk_usage = partial(lambda free, place: disk(place)._replace(free=free), free)
        if missing:
            modules[missing] = None
        with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
            code = main(words)
        if missing:
            del modules[missing]
            if absent:
                modules[missing] = absent
        print(json.dumps([code, said.getvalue(), sorted({*HEAVY} & {*modules} - before)]), file=real, flush=True)


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    main()
