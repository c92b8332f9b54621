"""Where OptiPFair and mergekit stand on the census of families: right, refused or wrong, on three cuts each.

    python benchmarks/peers_families.py [--only TYPE ...]     (half an hour on one core)

Each peer is installed in a virtual environment of its own, which borrows this one's torch and transformers,
and is given the same tiny models as benchmarks/family_census.py (run that first: its verdicts are layercut's
column). A cut is right when the saved result loads in the stock class with nothing missing, computes what
the original computes with those layers skipped (within 1e-5, where layercut is held to the bit), and
generates with the cache as without; refused when the peer raises; wrong otherwise. Writes
benchmarks/results/peers_families.json and docs/peers-families.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import site
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TABLE = ROOT / "docs" / "peers-families.md"
CUTS = ("odd", "first", "two")
PEERS = {
    "optipfair": ["optipfair==0.4.2"],
    "mergekit": [
        "mergekit==0.1.5",
        "pydantic~=2.10.6",
        "pydantic-core==2.27.2",
        "click==8.2.1",
        "immutables",
        "peft",
    ],
}
"""What each environment gets on top of this one, without dependencies."""


def environment(peer: str, folder: Path) -> Path:
    """A virtual environment with the peer in it; returns its python."""
    python = folder / peer / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder / peer], check=True)
        (borrowed,) = (folder / peer / "lib").glob("python*/site-packages")
        (borrowed / "borrowed.pth").write_text("\n".join(site.getsitepackages()) + "\n")
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", *PEERS[peer]], check=True)
    return python


# --- in the peer's environment -----------------------------------------------------------------------


def cut_with_optipfair(source: Any, removed: list[int], out: Path) -> None:
    import copy

    import optipfair

    model = optipfair.prune_model(
        copy.deepcopy(source.model), pruning_type="DEPTH", layer_indices=removed, show_progress=False
    )
    model.save_pretrained(out)


def cut_with_mergekit(source: Any, removed: list[int], out: Path) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    import families

    kept = [i for i in range(families.LAYERS) if i not in removed]
    slices = [{"sources": [{"model": str(source.folder), "layer_range": [i, i + 1]}]} for i in kept]
    config = {"merge_method": "passthrough", "dtype": "float32", "slices": slices}
    options = MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False)
    run_merge(MergeConfiguration.model_validate(config), str(out), options=options)


def judge(peer: str, source: Any, cut: str, scratch: Path) -> tuple[str, str]:
    import torch

    import census

    segments = census.segments_of(cut)
    removed = [i for s in segments for i in range(s.start, s.stop)]
    wanted = census.reference_logits(source.model, segments)
    out = scratch / "peer"
    shutil.rmtree(out, ignore_errors=True)
    try:
        {"optipfair": cut_with_optipfair, "mergekit": cut_with_mergekit}[peer](source, removed, out)
    except (Exception, SystemExit) as error:
        text = " ".join(str(error).replace(str(scratch), "").split())
        return "refused", f"{type(error).__name__}: {text[:120]}"
    try:
        model, info = type(source.model).from_pretrained(out, output_loading_info=True, dtype=torch.float32)
        if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
            return (
                "wrong",
                f"{len(info['missing_keys'])} weights missing, {len(info['unexpected_keys'])} left over",
            )
        got = census.logits_of(model.eval())
        most = max(1e-5, census.tolerance(model.config))
        if not torch.allclose(got, wanted, atol=most, rtol=most):
            return "wrong", f"logits differ by up to {(got - wanted).abs().max().item():.2g}"
        trouble = census.generation_trouble(model) if source.generates else ""
        return ("wrong", trouble) if trouble else ("right", "")
    except Exception as error:
        return "wrong", f"the result fails: {type(error).__name__}: {' '.join(str(error).split())[:100]}"


def child(peer: str, names: list[str]) -> None:
    """Judge a peer on these families; one JSON line each."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]
    import torch
    import transformers

    import census
    import families

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in names:
        model_type, facts = families.VARIANTS.get(name, (name, {}))
        try:
            with tempfile.TemporaryDirectory() as folder:
                source = census.original(model_type, Path(folder) / "source", **facts)
                row = {cut: judge(peer, source, cut, Path(folder)) for cut in CUTS}
        except Exception as error:  # no layers to skip were found, so that there is nothing to compare with
            print(f"not run: {name}: {error}", flush=True)
            continue
        print("\x1e" + json.dumps({name: row}), flush=True)


# --- in this one -------------------------------------------------------------------------------------


def verdict(row: dict[str, list[str]]) -> str:
    """right in all cuts; wrong in at least one; else refused in at least one."""
    kinds = {kind for kind, _ in row.values()}
    return "wrong" if "wrong" in kinds else "right" if kinds == {"right"} else "refused"


def table(result: dict[str, Any]) -> str:
    rows: dict[str, dict[str, Any]] = result["families"]
    tools = ("layercut", *PEERS)
    counts = {tool: Counter(verdict(row[tool]) for row in rows.values() if tool in row) for tool in tools}
    lines = [
        "# Peers on the same census",
        "",
        "Generated by `python benchmarks/peers_families.py` "
        f"({result['date']}, transformers {result['transformers']}): "
        f"the tiny models of [families.md](families.md), three cuts each ({', '.join(CUTS)}). "
        "A family counts as wrong when one of its cuts is silently wrong, as refused when one raises "
        "and none is wrong.",
        "",
        "| | right in every cut | refused | wrong |",
        "|---|---|---|---|",
    ]
    for tool in tools:
        version = PEERS[tool][0].partition("==")[2] if tool in PEERS else ""
        count = counts[tool]
        lines.append(f"| {tool} {version} | {count['right']} | {count['refused']} | {count['wrong']} |")
    lines += ["", "| family | " + " | ".join(tools) + " |", "|---|" + "---|" * len(tools)]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(_cell(row.get(tool)) for tool in tools) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, list[str]] | None) -> str:
    if row is None:
        return "not run"
    word = verdict(row)
    why = next((why for kind, why in row.values() if kind == word), "")
    return word if word == "right" else f"{word}: {why.split(' / ')[0][:90]}".replace("|", "\\|")


def main() -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--only", nargs="*", help="run these again and keep the other rows")
    parser.add_argument("--envs", type=Path, help="where to keep the environments (default: a temporary folder)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.only)
    ours = json.loads((RESULTS / "families.json").read_text())
    known = {n: r for n, r in ours["families"].items() if "cuts" in r and r["part"] != "vision"}
    names = [n for n in known if not args.only or n in args.only]
    rows: dict[str, Any] = {n: {"layercut": {cut: known[n]["cuts"][cut] for cut in CUTS}} for n in names}
    with tempfile.TemporaryDirectory() as temporary:
        children = {}
        for peer in PEERS:
            python = environment(peer, args.envs or Path(temporary))
            command = [python, __file__, "--child", peer, "--only", *names]
            children[peer] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for peer, process in children.items():
            assert process.stdout is not None
            for line in process.stdout:
                if "\x1e" in line:
                    for name, row in json.loads(line.partition("\x1e")[2]).items():
                        rows[name][peer] = row
                        print(f"{peer:10} {verdict(row):8} {name}", flush=True)
    if args.only and (RESULTS / "peers_families.json").exists():
        rows = json.loads((RESULTS / "peers_families.json").read_text())["families"] | rows
        rows = {name: rows[name] for name in known if name in rows}
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "transformers": ours["transformers"],
        "peers": {peer: packages[0] for peer, packages in PEERS.items()},
        "cuts": CUTS,
        "families": rows,
    }
    (RESULTS / "peers_families.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    TABLE.write_text(table(result), encoding="utf-8")


if __name__ == "__main__":
    main()
