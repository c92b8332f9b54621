"""The sections of the report and of the model card: a sentence, tables and charts about one thing that was measured.

To add one: a function of the run that returns a Section, or None where nothing is known, in `PAGE` and, where a table
says enough, in `CARD`. Text here is plain; the templates escape it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from layercut.export.engines import ENGINES
from layercut.report import charts
from layercut.report.formatting import (
    Json,
    change,
    command_line,
    count,
    dash,
    duration,
    figure,
    finite,
    label,
    layer_names,
    number,
    percent,
    plus_minus,
    printable,
    probability,
    short_name,
    signed,
    size,
    source_name,
    spans,
    times,
    whole,
)
from layercut.report.run_facts import (
    BOTH,
    STAGES,
    ProbeShare,
    RunFacts,
    evaluation_rows,
    final_factor,
    found_in_context,
    gap_closed,
    held_out_losses,
    main_tasks,
    perplexities,
    positions,
    recall,
    skills,
    source_bytes,
)
from layercut.report.verdicts import budgets, frontier_points


@dataclass(frozen=True)
class Table:
    """Cells of text; `wide` is the column that holds sentences, and is left-aligned."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    wide: int = 0
    strong: str = ""
    """First cell of the row that is set in bold."""


@dataclass(frozen=True)
class Section:
    """What is shown of one thing."""

    name: str
    """Its id on the page."""
    title: str
    note: str
    tables: Sequence[Table] = ()
    charts: Sequence[str] = ()


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], **how: Any) -> list[Table]:
    found = [list(row) for row in rows]
    return [Table(heads, found, **how)] if found else []


# ---- search and healing ----------------------------------------------------------------------------------------


def search(run: RunFacts) -> Section | None:
    """The candidates, and those that were evaluated after a short healing."""
    found = run.search
    if not list(found.candidates) or not spans(found.segments):
        return None
    note = (
        f"KL to the dense model of each cut, unhealed, on {whole(found.calibration.tokens)} tokens of calibration text."
    )
    if known := by_text(found):
        chosen, other = known
        note += (
            f" Text alone would take layers {layer_names(other.segments)}: KL {figure(other.kl)} nats on text and "
            f"{figure(other.probe_kl)} on probes; the choice has {figure(chosen.kl)} and {figure(chosen.probe_kl)}."
        )
    costs = ("folded", "healed", "longer")
    rows = [[layer_names(one.segments), *(dash(one[key]) for key in costs)] for one in found.shortlist]
    heads = ["shortlist: layers", "nats, folded", "healed shortly", "healed longer"]
    tables = _table(heads, rows, strong=layer_names(found.segments))
    if found.gate:
        note += " The concave gate (CLP) was moved from step to step as drawn; real cuts decided among its last places."
    drawn = [*charts.gate_maps(found), charts.cost_chart(found)]
    return Section("search", "Search", note, tables, [chart for chart in drawn if chart])


def by_text(found: Json) -> tuple[Json, Json] | None:
    """The first candidate, and the one that text alone would take, where probes made a difference."""
    chosen, other = next(iter(found.candidates), Json()), found.by_text
    known = all(finite(one.probe_kl) is not None for one in (chosen, other))
    return (chosen, other) if known and spans(chosen.segments) != spans(other.segments) else None


def probe_map(run: RunFacts) -> Section | None:
    """Which layers hold which skill."""
    drawn, words = charts.probe_maps(run), [printable(line) for line in run.capabilities.words]
    note = "KL increase of each kind of probe, nats per answer token, without the layers; framed: removed. " + " ".join(
        words
    )
    return Section("map", "What each layer is needed for", note.strip(), (), drawn) if drawn else None


def stages(run: RunFacts) -> Section | None:
    """Perplexity after each stage, with the course of tuning."""
    summary, found, tuning = run.summary, perplexities(run.summary), run.heal.tuning
    if not found:
        return None
    rows = []
    for name in STAGES:
        if name in found:
            only = Json({"perplexity": {"dense": found.get("dense"), name: found[name]}})
            factor, gap = final_factor(only), gap_closed(summary, name)
            over = times(factor, summary.perplexity.standard_error[name]) if factor is not None else "–"
            closed = "–" if gap is None else percent(gap) if gap >= 0 else "none"
            rows.append([name, figure(found[name]), "1×" if name == "dense" else over, closed])
    text = summary.perplexity
    note = (
        f"Perplexity on {whole(text.tokens)} tokens of {source_name(text.dataset)} in windows of {whole(text.window)}, "
        "± one standard error over the windows. Gap closed: the share of the cut's log-perplexity loss that is undone."
    )
    for fold in run.heal.fold:
        note += (
            f" Fold at {label([fold.segment])}: {', '.join(map(printable, fold.modules))} before the cut, error "
            f"{figure(fold.error_before)} → {figure(fold.error_after)} on {whole(fold.tokens)} tokens."
        )
    if tuning:
        layers = ", ".join(map(str, tuning.trained_layers))
        how = f", objective {printable(tuning.label or tuning.objective)}" if tuning.label or tuning.objective else ""
        note += (
            f" Tuned: {count(tuning.trained_parameters)} weights of layers {layers}{how}, {whole(tuning.steps)} steps."
        )
    if losses := held_out_losses(run.quantization.tuning):
        note += f" Trained after rounding: held-out loss {figure(losses[0])} → {figure(min(losses))}."
    chart = charts.tuning_chart(tuning)
    tables = [Table(["stage", "perplexity", "over dense", "gap closed"], rows, strong=rows[-1][0])]
    return Section("healing", "Healing", note, tables, [chart] if chart else [])


def frontier(run: RunFacts) -> Section | None:
    """Size against loss."""
    points, (allowed, loss) = frontier_points(run.frontier), budgets(run.frontier)
    asked = [size(allowed)] if allowed else []
    asked += [f"perplexity up by {percent(loss)}"] if loss is not None else []
    rows = [[f"{p.layers} layers, {p.bits} bits", size(p.bytes), signed(p.rise),
             "chosen" if p.chosen else "yes" if p.fits else "no"] for p in points]  # fmt: skip
    note = f"Every state that was measured on held-out text. Budgets: {' and '.join(asked) or 'none'}."
    heads = ["state", "size", "perplexity", "inside the budgets"]
    return Section("frontier", "Size against loss", note, _table(heads, rows)) if rows else None


def shares(run: RunFacts) -> Section | None:
    """What layers and bits take of a size."""
    rows = [[whole(p.layers), layer_names(p.segments), figure(p.mean_bits), size(p.bytes), figure(p.folded),
             figure(p.rounded), dash(p.left)] for p in run.shares.points]  # fmt: skip
    heads = ["removed", "layers", "bits a weight", "size", "cost of the cut", "cost of the bits", "healed and rounded"]
    note = "The target size by removing layers or by fewer bits: estimated costs and those healed, nats per token."
    return (
        Section("shares", "Layers or bits", note, _table(heads, rows, strong=whole(run.shares.layers)))
        if rows
        else None
    )


def bits(run: RunFacts) -> Section | None:
    """The bits of each matrix."""
    drawn, mixture = charts.bit_map(run.quantization), run.quantization.mixture
    outside = [f"{name} {width}" for name, width in charts.chosen_bits(run.quantization).items()
               if not charts.IN_LAYER.search(name)]  # fmt: skip
    note = (
        f"Chosen for the target size: {figure(mixture.mean_bits)} bits a weight on average, estimated KL increase "
        f"{figure(mixture.predicted_kl)} nats per token."
        + (f" Outside the layers: {', '.join(outside)}." if outside else "")
    )
    return Section("bits", "Bits of each matrix", note, (), [drawn]) if drawn else None


# ---- what it still does ----------------------------------------------------------------------------------------


def probe_table(probes: Iterable[ProbeShare]) -> list[Table]:
    """Shares of the answers, with n and the 95 % interval of the pruned model's."""
    rows = []
    for probe in probes:
        between = "–" if probe.interval is None else " to ".join(f"{100 * end:.0f}" for end in probe.interval) + "%"
        shown = [dash(value, percent) for value in (probe.dense, probe.pruned)]
        rows.append([probe.name, "–" if probe.items is None else str(probe.items), *shown, between,
                     dash(probe.kl)])  # fmt: skip
    return _table(["probe", "n", "dense", "pruned", "95% interval", "KL, nats"], rows)


def abilities(run: RunFacts) -> Section | None:
    """Recall and skills."""
    lengths = [
        ProbeShare(name=f"{one.capability}, rows of {whole(one.length)} tokens", items=int(finite(one.answers) or 0),
              dense=finite(one.dense), pruned=finite(one.compressed)) for one in run.capabilities.by_length
    ]  # fmt: skip
    tables = probe_table([*skills(run.capabilities.judged), *lengths, *recall(run.summary)])
    note = (
        "Probes of their own family, unseen in search and tuning: answers given by greedy decoding, KL on their tokens."
    )
    return Section("probes", "Recall and skills", note, tables) if tables else None


def task_tables(scored: Json) -> list[Table]:
    """Tasks, and evaluations of packages."""
    rows = []
    for task, main in main_tasks(scored):
        for metric, row in [(printable(main.metric), main), *main.others.entries()]:
            if any(number(row[model]) is not None for model in BOTH):
                flips = [dash(row.lost, whole), dash(row.gained, whole)]
                both = (plus_minus(row[model], row[f"{model}_stderr"]) for model in BOTH)
                name = task if row is main else ""
                rows.append([name, metric, whole(main["items"]), *both, *flips, probability(row.p_value)])
    heads = ["task", "metric", "n", "dense", "pruned", "lost", "gained", "p"]
    own = _table(["evaluation", "metric", "dense", "pruned", "change"], evaluation_rows(scored))
    return _table(heads, rows) + own


def tasks(run: RunFacts) -> Section | None:
    """Task scores of both models."""
    tables, kept = task_tables(run.scored), run.scored.retention
    note = "± one standard error; lost and gained: items from right to wrong and back; p: McNemar's exact test."
    if finite(kept.above_chance) is not None:
        note += f" Kept: {percent(kept.mean)} of the score, {percent(kept.above_chance)} of what is above chance."
    return Section("tasks", "Tasks", note, tables) if tables else None


def long_context(run: RunFacts) -> Section | None:
    """Perplexity by position."""
    long = run.summary.long_context
    rows = [[f"{a:,}–{b - 1:,}", figure(dense), figure(pruned), times(pruned / dense) if dense and pruned else "–"]
            for a, b, dense, pruned in positions(run.summary)]  # fmt: skip
    note = f"Perplexity by position in {whole(long.windows)} windows of {whole(long.window)} tokens."
    if cost := long.cost:
        note += (
            f" Such a prompt takes {' and '.join(duration(cost.prefill_seconds[model]) for model in BOTH)}, "
            f"its KV cache {' and '.join(size(cost.kv_bytes[model]) for model in BOTH)}."
        )
    return (
        Section("long", "Long context", note, _table(["positions", "dense", "pruned", "over dense"], rows))
        if rows
        else None
    )


def generation(run: RunFacts) -> Section | None:
    """Figures of both models' continuations."""
    health = run.health
    if not health:
        return None
    names = {"repeated_4grams": "4-grams that repeat", "distinct_1": "distinct words", "distinct_2": "distinct pairs"}
    rows = [[words, *(dash(health[model][key], percent) for model in BOTH)] for key, words in names.items()]
    rows += [["dense model's loss on it, nats", *(figure(health[model].dense_loss) for model in BOTH)]]
    if health.replies:
        rows += [["tokens of a reply", figure(health.replies.dense), figure(health.replies.compressed)]]
    note = f"{whole(health.prompts)} greedy continuations of {whole(health.tokens)} tokens by each model."
    return Section("generation", "Generated text", note, _table(["", "dense", "pruned"], rows))


# ---- cost, engines, provenance ---------------------------------------------------------------------------------


def speed(run: RunFacts) -> Section | None:
    """Size and speed."""
    found, s = run.speed, run.summary
    rows = [[name, show(before), show(after), change(before, after)] for name, show, before, after in (
        ("layers", whole, s.layers.before, s.layers.after),
        ("parameters", whole, s.parameters.before, s.parameters.after),
        ("weight files", size, source_bytes(s), s.bytes.after),
    )]  # fmt: skip
    for phase in ("prefill", "decode"):
        if row := found[phase]:
            rows.append([f"{phase}, tokens/s", figure(row.dense), figure(row.compressed), times(row.ratio)])
    for key, words in (("kv_bytes_per_token", "KV cache per token"), ("generation_bytes", "working memory")):
        if row := found[key]:
            rows.append([words, size(row.dense), size(row.compressed), change(row.dense, row.compressed)])
    note = "Speed was not measured."
    if found:
        threads = f", {whole(found.threads)} threads" if found.threads else ""
        note = f"On {printable(found.device)}{threads}, both models by turns; medians, of the turns' ratios too."
        if share := found.decode.layer_share:
            note += f" {percent(share)} of the dense model's decoding is spent in its layers."
    return Section("speed", "Size and speed", note, _table(["", "dense", "pruned", "change"], rows))


READINGS = {"right": "right", "note": "right", "misread": "would misread it", "refused": "does not load it"}


def engine_rows(readings: Iterable[Any]) -> list[tuple[str, str, str]]:
    """Engine, what it makes of a model, and why; of readings as far as this layercut knows both names."""
    return [
        (ENGINES[str(one.consumer)].title, READINGS[str(one.verdict)], printable(one.words))
        for one in readings
        if one.consumer in ENGINES and one.verdict in READINGS
    ]


def engines(run: RunFacts) -> Section | None:
    """Which engines read the result right."""
    rows, check = engine_rows(run.summary.consumers), run.export.check
    note = "By the rules known of each engine; --for restricts the search to cuts that it reads right."
    if how := check.how or check.logits:
        note += f" Verified in a fresh process: logits {printable(how)}."
    return Section("engines", "Engines", note, _table(["engine", "reads it", "why"], rows, wide=2)) if rows else None


def later(run: RunFacts) -> Section | None:
    """What `layercut evaluate RUN` measured."""
    tables = []
    for one in run.evaluations:
        if one.perplexity:
            text, ratio, error = one.text, one.ratio.value, finite(one.ratio.standard_error)
            over = dash(ratio, times) + (f" ± {error:.2g}" if error is not None else "")
            both = (figure(one.perplexity[model]) for model in BOTH)
            row = [source_name(text.source), whole(text.tokens), whole(text.window), *both, over, printable(one.date)]
            tables.append(row)
    found = _table(["text", "tokens", "window", "dense", "pruned", "over dense", "date"], tables)
    for one in run.evaluations:
        dense, pruned = (one.probes[model] for model in BOTH)
        found += probe_table([
            *skills(pruned.capabilities),
            *found_in_context("hidden keys", dense["keys"], pruned["keys"]),
            *found_in_context("list values", dense.lists, pruned.lists),
        ]) + ([] if one is run.scored else task_tables(one))  # fmt: skip
    note = f"By layercut evaluate {run.place}." if run.place else "Measured after the run."
    return Section("evaluations", "Measured afterwards", note, found) if found else None


def sources(run: RunFacts) -> Section | None:
    """Texts, time, machine, versions, command."""
    s, env, texts = run.summary, run.env, []
    for use, text, source in (
        ("calibration", run.search.calibration, run.search.calibration.source),
        ("tuning", run.heal.tuning.data, run.heal.tuning.data.source),
        ("evaluation", s.perplexity, s.perplexity.dataset),
    ):
        if text:
            texts.append([use, source_name(source), whole(text.tokens), printable(text.fingerprint) or "–"])
    facts = [["model", short_name(s.model)]]
    if run.search:
        seed = f", seed {run.search.seed}" if finite(run.search.seed) is not None else ""
        cost = run.search.cost
        passes = f"{whole(cost.layer_forwards)} layer forwards, {whole(cost.layer_backwards)} backwards"
        facts.append(["search", f"{printable(run.search.method)}{seed}, {passes}"])
    shared = s.perplexity.shared
    facts += [
        ["evaluation text seen in search or tuning", f"{whole(shared.documents)} documents" if shared else ""],
        ["time", ", ".join(f"{name} {duration(seconds)}" for name, seconds in s.seconds.entries())],
        ["peak memory", size(s.peak_rss_bytes)],
        ["accelerator's peak memory", size(s.peak_device_bytes) if s.peak_device_bytes else ""],
        ["machine", printable(env.hardware or env.cpu)],
        ["date", printable(env.date)],
        [
            "versions",
            ", ".join(f"{printable(name)} {version}" for name, version in (s.versions or env.versions).entries()),
        ],
        ["command", command_line(env.command)],
    ]
    known = [row for row in facts if row[1]]
    missing = {
        "tasks": main_tasks(run.scored),
        "speed": run.speed,
        "long context": positions(s),
        "probes": abilities(run),
    }
    names = [name for name, there in missing.items() if not there]
    note = f"Not measured: {', '.join(names)}." if names else ""
    tables = [*_table(["used for", "text", "tokens", "fingerprint"], texts, wide=1), Table(["", ""], known, wide=1)]
    return Section("provenance", "Data and provenance", note, tables)


PAGE: list[Callable[[RunFacts], Section | None]] = [
    search, stages, abilities, tasks, long_context, generation, probe_map, speed, bits, shares, frontier,
    engines, later, sources,
]  # fmt: skip
CARD: list[Callable[[RunFacts], Section | None]] = [
    stages, tasks, abilities, long_context, generation, speed, shares, frontier, sources,
]  # fmt: skip


def of(run: RunFacts, which: Iterable[Callable[[RunFacts], Section | None]]) -> list[Section]:
    """Those of which something is known."""
    return [found for section in which if (found := section(run))]
