"""The command `layercut`: parse, call, print. No logic, and no torch before a command needs it.

Exit codes: 0 done, 2 the input is wrong (`error:` and `hint:` on stderr), 1 a fault of layercut.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import signal
import sys
import traceback
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from attrs import evolve
from cyclopts import Parameter
from cyclopts.help import DefaultFormatter

from layercut import __version__
from layercut.cli.config_file import take_config
from layercut.config.commands import (
    ChatConfig,
    CompareConfig,
    CompressConfig,
    CutConfig,
    ExportConfig,
    FindConfig,
    LogConfig,
    PerplexityConfig,
    PlanConfig,
    PushConfig,
    QuantizeAloneConfig,
    RunConfig,
    TuneConfig,
)
from layercut.errors import LayercutError, shown
from layercut.files import disk_refusal

FEW = {
    "--ratio", "--segment", "--target-size", "--max-loss", "--preserve", "--bits", "--for", "--data", "--tune-data",
    "--tune-tokens", "--eval-data", "--tasks", "--out", "--config",
}  # fmt: skip
"""Options of compress that --help shows; --help-all shows every one."""


class ShortHelp(DefaultFormatter):
    """Boxes without the options that are not among FEW, each option by its first sentence."""

    full = False

    def __call__(self, console: Any, options: Any, panel: Any) -> None:
        """Print a box, unless nothing of it is left."""
        if panel.format == "parameter":
            every = {name for argument in app["compress"].assemble_argument_collection() for name in argument.names}
            names = [{*one.positive_names} for one in panel.entries]
            shown = [
                one for one, own in zip(panel.entries, names, strict=True) if self.full or own & FEW or not own & every
            ]
            for entry in shown:
                words = " ".join(entry.description.primary_renderable.plain.split())
                first = words if self.full else re.split(r"(?<=[\w)]{2})[.;] |\.$", words)[0]
                entry.description.primary_renderable.plain = first
            panel = evolve(panel, entries=shown)
        if panel.entries:
            super().__call__(console, options, panel)


MORE = "layercut COMMAND --help-all lists every option."

app = cyclopts.App(
    name="layercut",
    help_format="plaintext",
    help_formatter=ShortHelp(),
    help_epilogue=MORE,
    help="Make a large language model smaller: find the layers it can best do without, cut, heal, prove.",
    version=__version__,
    result_action="return_value",
    suppress_keyboard_interrupt=False,
    default_parameter=Parameter(show_default=lambda value: None if value in (None, (), "") else str(value)),
)

Model = Annotated[str, Parameter(help="A Hub id, a folder, or a .gguf file.")]
RunFolder = Annotated[Path, Parameter(help="A run folder, as left by compress.")]
Log = LogConfig | None
"""Not used in a command: `_run` has set up the messages before."""


@app.command
def compress(model: Model, *, config: CompressConfig | None = None, log: Log = None) -> None:
    """The whole journey: search, cut, heal, measure, export, report.

    Examples, in order: remove a fifth of the layers; with 4-bit weights; to a size; as a file for llama.cpp:

        layercut compress MODEL --ratio 0.2
        layercut compress MODEL --ratio 0.2 --bits 4 --out runs/small
        layercut compress MODEL --bits auto --target-size 60MB
        layercut compress MODEL.gguf --ratio 0.2 --out small.gguf
    """
    from layercut.run import run

    config = config or CompressConfig()
    _show(run(model, config, own_process=True), config.run.out)


@app.command
def search(model: Model, *, config: FindConfig | None = None, log: Log = None) -> None:
    """Find the segment to remove by plain cuts, and stop there; compress with the same --out goes on.

    For example:

        layercut search MODEL --ratio 0.2 --data mine.txt
    """
    from layercut.pipeline.journey import compress
    from layercut.report.page import search_lines

    run = compress(model, (config or FindConfig()).journey(), until="search", own_process=True)
    print(*search_lines(json.loads((run / "search.json").read_text())), sep="\n")


@app.command
def tune(model: Model, *, config: TuneConfig | None = None, log: Log = None) -> None:
    """Search, cut and heal; save the checkpoint, measure nothing; compress with the same --out resumes after it.

    For example:

        layercut tune MODEL --segment 13:19 --tune-data mine.txt
    """
    from layercut.run import run

    tuned = run(model, (config or TuneConfig()).journey(), until="tune", own_process=True)
    print(shown(str(tuned / "model")))


@app.command
def cut(model: Model, *, config: CutConfig, log: Log = None) -> None:
    """Cut segments out of a checkpoint on disk, without loading it; --out gets the smaller checkpoint.

    For example, without layers 13 to 18:

        layercut cut MODEL --segment 13:19 --out smaller
    """
    from layercut.cli.single_stage import cut

    print(shown(str(cut(model, config))))


@app.command
def quantize(
    model: Annotated[str, Parameter(help="A run folder, or a model: Hub id, folder, .gguf file.")],
    *,
    config: QuantizeAloneConfig,
    log: Log = None,
) -> None:
    """Store a model's weights in 8 to 2 bits; --out gets a checkpoint that transformers reads, or a GGUF file.

    For example:

        layercut quantize MODEL --bits 4 --out quantized
    """
    from layercut.cli.single_stage import quantize_alone

    print(shown(str(quantize_alone(model, config))))


@app.command
def export(
    model: Annotated[str, Parameter(help="A run folder, or a checkpoint folder.")],
    *,
    config: ExportConfig,
    log: Log = None,
) -> None:
    """Write a finished run's model in another format: a GGUF file for llama.cpp, or that of a package.

    For example:

        layercut export runs/small --out small.gguf
    """
    from layercut.pipeline.handover import export

    print(shown(str(export(model, config))))


@app.command
def evaluate(
    model: Annotated[str, Parameter(help="A run folder, or a model: Hub id, folder, .gguf file.")],
    *,
    config: PerplexityConfig | None = None,
    log: Log = None,
) -> None:
    """Perplexity, tasks and more of a model, or of a run's dense and pruned model side by side.

    For example:

        layercut evaluate runs/small --eval-data c4:validation
    """
    from layercut.cli.single_stage import evaluate_only
    from layercut.report.page import evaluation_lines

    config = config or PerplexityConfig()
    found = evaluate_only(model, config)
    print(*([json.dumps(found, indent=1)] if config.json else evaluation_lines(found)), sep="\n")


@app.command
def compare(model: Model, *, config: CompareConfig | None = None, log: Log = None) -> None:
    """Search methods side by side: the same tokens, what each removes, what that costs before and after the fold.

    With --tasks and --probes also what each cut still does, cut, folded and tuned. For example:

        layercut compare MODEL --ratio 0.2 --methods fisher:all,cosine,sleb --tasks arc_easy,piqa --limit 400 --probes
    """
    from rich.console import Console

    from layercut.pipeline.compare import compare
    from layercut.report.page import comparison_tables

    run = compare(model, config or CompareConfig(), own_process=True)
    console, found = Console(highlight=False), json.loads((run / "compare.json").read_text())
    for table in comparison_tables(found):
        console.print(table)
    console.print(shown(f"report  {run / 'compare.html'}"), soft_wrap=True, markup=False)


@app.command
def plan(model: Model, *, config: PlanConfig | None = None, log: Log = None) -> None:
    """What compress with the same flags would take: parameters, memory, time, from the config alone.

    For example:

        layercut plan MODEL --ratio 0.2
    """
    from rich.console import Console

    from layercut.cli.plan import tables
    from layercut.plan import plan_run

    config = config or PlanConfig()
    found = plan_run(model, config)
    if config.json:
        print(json.dumps(found, indent=1))
        return
    console = Console(highlight=False)
    for part in tables(found):
        console.print(part)


@app.command
def push(
    model: Annotated[str, Parameter(help="A run folder, a checkpoint folder, or a .gguf file.")],
    name: Annotated[str, Parameter(help="owner/name on the Hub, or name for your own.")],
    *,
    config: PushConfig | None = None,
    log: Log = None,
) -> None:
    """Upload a finished run's model, or a checkpoint, to the Hub with its card.

    For example:

        layercut push runs/small small-model --private
    """
    from layercut.pipeline.handover import push

    print(shown(push(model, name, **asdict(config or PushConfig()))))


@app.command
def chat(run: RunFolder, *, config: ChatConfig | None = None, log: Log = None) -> None:
    """Talk to a run's dense and pruned model, side by side.

    A line is a message; /new begins a new chat, and the end of the input ends it. For example:

        layercut chat runs/small
    """
    from layercut.cli.chat import chat

    chat(run, config or ChatConfig())


@app.command
def report(run: RunFolder, *, log: Log = None) -> None:
    """Write report.html again from what a run folder holds."""
    from layercut.report.run_facts import check_finished_run

    if not (run / "compare.json").is_file():
        check_finished_run(run)  # before torch is imported
    from layercut.report.page import write_report

    print(shown(str(write_report(run))))


@app.command
def demo(*, run: RunConfig | None = None, log: Log = None) -> None:
    """The main job on a small real model (SmolLM2-135M-Instruct), with nothing to prepare."""
    from layercut.cli.demo import demo

    _show(demo(run or RunConfig()))


TOGETHER = ("compress", "search", "tune", "compare", "evaluate")
"""Commands that several processes may do together."""
RESUMED = {"compress", "search", "tune", "compare", "demo"}
"""Commands with a run folder."""

CHECKED: dict[str, Any] = {"compress": CompressConfig, "search": FindConfig, "tune": TuneConfig,
                           "compare": CompareConfig, "evaluate": PerplexityConfig, "cut": CutConfig,
                           "quantize": QuantizeAloneConfig}  # fmt: skip
"""Commands that read a model, and what they take."""
Outcome = tuple[int, list[str]]
"""An exit code, and the lines that say why on stderr."""


def main(argv: list[str] | None = None) -> int:
    """Run a command, and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    ShortHelp.full = "--help-all" in arguments
    app.help_epilogue = None if ShortHelp.full else MORE
    arguments = ["--help" if argument == "--help-all" else argument for argument in arguments]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # threads that spin while another process has their core slow small products tenfold; read when torch is loaded
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return _one_of_several(arguments)
    code, lines = _run(arguments)
    try:
        for line in lines:
            print(shown(line), file=sys.stderr)
    except BrokenPipeError:
        return _reader_gone()
    return code


def _one_of_several(arguments: list[str]) -> int:
    """Run a command as one of the processes that torchrun or accelerate launch started; the main one prints.

    The first process that fails says why, and all end with its exit code.
    """
    from layercut.distributed import processes

    command = arguments[0] if arguments else ""
    alone = not command.startswith("-") and command in app and command not in TOGETHER
    with Path(os.devnull).open("w") as nowhere:
        try:
            processes.start()
            with nullcontext() if processes.is_main() else redirect_stdout(nowhere):
                refused = f"several processes were started, and layercut {command} works in one"
                code, lines = (
                    _refusal(refused, "run it without torchrun or accelerate launch") if alone else _run(arguments)
                )
        except LayercutError as error:
            code, lines = _refusal(error.message, error.hint)
        except Exception:
            code, lines = 1, traceback.format_exc().splitlines()
    if code:
        with processes.first_to_fail(code) as earlier:
            for line in lines if earlier is None else []:
                print(shown(line), file=sys.stderr)
        return earlier or code
    processes.stop()
    return 0


def _run(arguments: list[str]) -> Outcome:
    """Run a command."""
    try:
        flags = take_config(app, arguments)
        command, given, _ = app.parse_args(arguments, exit_on_error=False, print_error=False)
        from layercut import progress  # not for --help: it loads rich

        log = asdict(given.arguments.get("log") or LogConfig())
        with progress.shown(**log) if "log" in given.signature.parameters else nullcontext():
            if "model" in given.arguments and arguments[0] in CHECKED:
                from layercut.cli.early_checks import check  # loads numpy

                config = given.arguments.get("config") or CHECKED[arguments[0]]()
                given.arguments["config"] = check(given.arguments["model"], config, flags)
            command(*given.args, **given.kwargs)
        sys.stdout.flush()
    except LayercutError as error:
        return _refusal(error.message, error.hint)
    except cyclopts.CycloptsError as error:
        # checks in a dataclass come back wrapped in what cyclopts was doing at the time
        cause = error.__cause__ or error.__context__
        if isinstance(cause, LayercutError):
            return _refusal(cause.message, cause.hint)
        known = bool(arguments) and not arguments[0].startswith("-") and arguments[0] in app
        return _refusal(_words(error), " ".join(["see layercut", *arguments[:known], "--help"]))
    except BrokenPipeError:
        return _reader_gone(), []
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # what rich makes of it, wherever it was printing
            return _reader_gone(), []
        raise
    except KeyboardInterrupt:
        resumes = "; the same command resumes after the last finished stage" if {*arguments[:1]} & RESUMED else ""
        return 130, [f"stopped{resumes}"]
    except Exception as error:
        if (refused := disk_refusal(error)) is None:
            raise
        try:
            sys.stdout.flush()
        except OSError:  # stdout itself cannot be written: Python would flush it once more at exit, and fail
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _refusal(refused.message, refused.hint)
    return 0, []


def _reader_gone() -> int:
    """The exit code where stdout's reader has closed it, as after `head`: that of SIGPIPE; nothing more is printed."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())
    return 128 + signal.SIGPIPE


def _words(error: cyclopts.CycloptsError) -> str:
    """What cyclopts says, on one line; a key of --config is called what it is in the file."""
    if isinstance(error, cyclopts.UnknownOptionError) and error.token.source != "cli":
        key = (error.token.keyword or "").strip("[]")
        flags = [flag for argument in error.argument_collection for flag in argument.names]
        near = difflib.get_close_matches(key, [flag.strip("-").replace("-", "_") for flag in flags], 1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        return f"{error.token.source} has an unknown key {key!r}{meant}"
    return " ".join(str(error).split())


def _refusal(message: str, hint: str) -> Outcome:
    return 2, [f"error: {message}", *([f"hint: {hint}"] if hint else [])]


def _show(run: Path, out: Path | None = None) -> None:
    """How the run ended, and the file that was asked for."""
    from rich.console import Console

    from layercut.pipeline.handover import result_of
    from layercut.report.page import closing

    console = Console(highlight=False)
    for line in closing(run, out if out and out.suffix == ".gguf" else result_of(run)):
        console.print(line, soft_wrap=True)
