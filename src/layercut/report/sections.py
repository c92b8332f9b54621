"""The sections of the report and of the model card: a sentence, tables and charts about one thing that was measured.

To add one: a function of the run that returns a Section, in `PAGE` and, where a table says enough, in `CARD`; one
without a row or a chart is left out. Text here is plain; the templates escape it.
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
    deviation,
    duration,
    figure,
    finite,
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
    found_in_context,
    gap_closed,
    held_out_losses,
    main_tasks,
    perplexities,
    positions,
    recall,
    skills,
)


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
    charts: Sequence[str | None] = ()


def of(run: RunFacts, which: Iterable[Callable[[RunFacts], Section]]) -> list[Section]:
    """Those that have a row or a chart, without what is empty in them."""
    found = []
    for section in (make(run) for make in which):
        tables = [table for table in section.tables if table.rows]
        drawn = [chart for chart in section.charts if chart]
        if tables or drawn:
            found.append(Section(section.name, section.title, section.note, tables, drawn))
    return found


# ---- search and healing ----------------------------------------------------------------------------------------


def search(run: RunFacts) -> Section:
    found, chosen = run.search, next(iter(run.search.candidates), Json())
    note = f"KL to the dense model of each cut, unhealed, on {whole(found.calibration.tokens)} tokens."
    other = found.by_text
    if other and spans(other.segments) != spans(chosen.segments):
        note += (
            f" Text alone would take layers {layer_names(other.segments)}: KL {figure(other.kl)} nats on text and "
            f"{figure(other.probe_kl)} on probes; the choice has {figure(chosen.kl)} and {figure(chosen.probe_kl)}."
        )
    if found.gate:
        note += " The concave gate (CLP) was moved from step to step as drawn; real cuts decided among its last places."
    note += decided(found)
    if found.shortlist:
        note += " The shortlist is of text and probes; a neighbour replaces the first where it is clearly cheaper."
    costs = {"folded": "after a quick fold, nats", "healed": "healed shortly", "longer": "healed longer"}
    known = [key for key in costs if any(number(one[key]) is not None for one in found.shortlist)]
    rows = [[layer_names(one.segments), *(dash(one[key]) for key in known)] for one in found.shortlist]
    heads = ["shortlist: layers", *(costs[key] for key in known)]
    shortlist = Table(heads, rows, strong=layer_names(found.segments))
    return Section("search", "Search", note, [shortlist], [*charts.gate_maps(found), charts.cost_chart(found)])


def decided(found: Json) -> str:
    """A sentence: what each part of the search put first, and from which part on that is what was removed."""
    parts = [(name, layer_names(cuts)) for name, cuts in found.first_by.entries()]
    if parts and found.shortlist:
        healed = any(one.healed for one in found.shortlist)
        parts.append(("healing" if healed else "a quick fold", layer_names(found.segments)))
    if len(parts) < 2:
        return ""
    last = max((at + 1 for at, (_, layers) in enumerate(parts) if layers != parts[-1][1]), default=0)
    end = f"{parts[last][0][0].upper()}{parts[last][0][1:]} decided" if last else "They agree"
    return f" First by {'; by '.join(f'{name}: {layers}' for name, layers in parts)}. {end}."


def probe_map(run: RunFacts) -> Section:
    note = "How much worse each kind of probe gets without a layer, KL in nats per answer token; framed: removed."
    return Section("map", "What each layer is needed for", note, (), charts.probe_maps(run))


def stages(run: RunFacts) -> Section:
    summary, found, tuning, rows = run.summary, perplexities(run.summary), run.heal.tuning, []
    for name, value in ((name, found[name]) for name in STAGES if name in found):
        error, gap = finite(summary.perplexity.standard_error[name]), gap_closed(summary, name)
        closed = "–" if gap is None else percent(gap) if gap >= 0 else "none"
        rows.append([name, figure(value), "–" if error is None else deviation(value * error), closed])
    text = summary.perplexity
    note = (
        f"Perplexity on {whole(text.tokens)} tokens of {source_name(text.dataset)} in windows of {whole(text.window)}, "
        "± one standard error of the difference from the dense model; earlier states on some of the windows. "
        "Gap closed: the share of the cut's log-perplexity loss that is undone."
    )
    for fold in run.heal.fold:
        note += (
            f" Fold of layers {layer_names([fold.segment])}: {', '.join(map(printable, fold.modules))} before them, "
            f"error {figure(fold.error_before)} → {figure(fold.error_after)} on {whole(fold.tokens)} tokens."
        )
    if tuning:
        before = {str(i): layer for i, layer in enumerate(summary.original_layer_index)}  # as the picture counts
        layers = ", ".join(str(before.get(str(i), i)) for i in tuning.trained_layers)
        lora = " (LoRA, merged)" if tuning.train == "lora" else ""
        objective = printable(tuning.label or tuning.objective)
        note += (
            f" Tuned: {count(tuning.trained_parameters)} weights of layers {layers}{lora}, {whole(tuning.steps)} steps"
        )
        note += f", objective {objective}." if objective else "."
    if losses := held_out_losses(run.quantization.tuning):
        note += f" Trained after rounding: held-out loss {figure(losses[0])} → {figure(min(losses))}."
    heads = ["stage", "perplexity", "±", "gap closed"]
    tables = [Table(heads, rows, strong=rows[-1][0] if rows else "")]
    return Section("healing", "Healing", note, tables, [charts.tuning_chart(tuning)])


def frontier(run: RunFacts) -> Section:
    rows = [[f"{whole(p.layers)} layers, {whole(p.bits)} bits", size(p.bytes), signed(p.rise),
             "chosen" if p == run.frontier.chosen else ""] for p in run.frontier.points]  # fmt: skip
    table = Table(["state", "size", "perplexity", ""], rows)
    return Section("frontier", "Size against loss", "Every state that was measured on held-out text.", [table])


def shares(run: RunFacts) -> Section:
    rows = [[whole(p.layers), layer_names(p.segments), figure(p.mean_bits), size(p.bytes), figure(p.folded),
             figure(p.rounded)] for p in run.shares.points]  # fmt: skip
    heads = ["removed", "layers", "bits a weight", "size", "cost of the cut", "cost of the bits"]
    note = "The target size by removing layers or by fewer bits: estimated costs in nats per token."
    return Section("shares", "Layers or bits", note, [Table(heads, rows, strong=whole(run.shares.layers))])


def bits(run: RunFacts) -> Section:
    mixture = run.quantization.mixture
    outside = [f"{name} {width}" for name, width in charts.chosen_bits(run.quantization).items()
               if not charts.IN_LAYER.search(name)]  # fmt: skip
    note = f"Chosen for the target size: {figure(mixture.mean_bits)} bits a weight on average, estimated KL increase "
    note += f"{figure(mixture.predicted_kl)} nats per token." + (f" {', '.join(outside)}." if outside else "")
    return Section("bits", "Bits of each matrix", note, (), [charts.bit_map(run.quantization)])


# ---- what it still does ----------------------------------------------------------------------------------------


def probe_table(probes: Iterable[ProbeShare]) -> Table:
    """Shares of the answers, with n and the 95 % interval of the pruned model's."""
    rows = []
    for probe in probes:
        between = "–" if probe.interval is None else "–".join(f"{100 * end:.0f}" for end in probe.interval) + "%"
        shown = (dash(value, percent) for value in (probe.dense, probe.pruned))
        kl = "–" if (found := number(probe.kl)) is None else deviation(found)
        rows.append([probe.name, dash(probe.items, whole), *shown, between, kl])
    return Table(["probe", "n", "dense", "pruned", "95% interval", "KL, nats"], rows)


def abilities(run: RunFacts) -> Section:
    lengths = [
        ProbeShare(name=f"{one.capability}, {whole(one.length)} tokens", items=int(finite(one.answers) or 0),
                   dense=finite(one.dense), pruned=finite(one.compressed)) for one in run.capabilities.by_length
    ]  # fmt: skip
    table = probe_table([*skills(run.capabilities.judged), *lengths, *recall(run.summary)])
    note = (
        "Probes in wordings that neither search nor tuning saw; both saw the same kinds of question, so that a gain is "
        "owed to tuning. Answers by greedy decoding, KL on their tokens."
    )
    return Section("probes", "Recall and skills", note, [table])


def task_tables(scored: Json) -> list[Table]:
    rows = []
    for task, main in main_tasks(scored):
        for metric, row in [(printable(main.metric), main), *main.others.entries()]:
            if any(number(row[model]) is not None for model in BOTH):
                both = (plus_minus(row[model], row[f"{model}_stderr"]) for model in BOTH)
                flips = dash(row.lost, whole), dash(row.gained, whole), probability(row.p_value)
                rows.append([task if row is main else "", metric, whole(main["items"]), *both, *flips])
    own = Table(["evaluation", "metric", "dense", "pruned", "change"], evaluation_rows(scored))
    return [Table(["task", "metric", "n", "dense", "pruned", "lost", "gained", "p"], rows), own]


def tasks(run: RunFacts) -> Section:
    note = "± one standard error; lost and gained: items from right to wrong and back; p: McNemar's exact test."
    return Section("tasks", "Tasks", note, task_tables(run.scored))


def long_context(run: RunFacts) -> Section:
    long = run.summary.long_context
    rows = [[f"{a:,}–{b - 1:,}", figure(dense), figure(pruned), times(pruned / dense) if dense and pruned else "–"]
            for a, b, dense, pruned in positions(run.summary)]  # fmt: skip
    note = f"Perplexity by position in {whole(long.windows)} windows of {whole(long.window)} tokens."
    if cost := long.cost:
        note += (
            f" Such a prompt takes {' and '.join(duration(cost.prefill_seconds[model]) for model in BOTH)}, "
            f"its KV cache {' and '.join(size(cost.kv_bytes[model]) for model in BOTH)}."
        )
    return Section("long", "Long context", note, [Table(["positions", "dense", "pruned", "over dense"], rows)])


def generation(run: RunFacts) -> Section:
    health = run.health
    names = {"repeated_4grams": "4-grams that repeat", "distinct_1": "distinct words", "distinct_2": "distinct pairs"}
    rows = [[words, *(dash(health[model][key], percent) for model in BOTH)] for key, words in names.items()]
    rows.append(["dense model's loss, nats", *(dash(health[model].dense_loss) for model in BOTH)])
    rows.append(["tokens of a reply to a chat", *(dash(health.replies[model]) for model in BOTH)])
    known = [row for row in rows if row[1:] != ["–", "–"]]
    note = f"{whole(health.prompts)} greedy continuations of {whole(health.tokens)} tokens by each model."
    return Section("generation", "Generated text", note, [Table(["", "dense", "pruned"], known)])


# ---- cost, engines, provenance ---------------------------------------------------------------------------------


def speed(run: RunFacts) -> Section:
    found, s = run.speed, run.summary
    rows = [[name, show(before), show(after), change(before, after)] for name, show, before, after in (
        ("layers", whole, s.layers.before, s.layers.after),
        ("parameters", whole, s.parameters.before, s.parameters.after),
        ("KV cache per token", size, found.kv_bytes_per_token.dense, found.kv_bytes_per_token.compressed),
    ) if number(before) is not None]  # fmt: skip
    row, note = found.prefill, "Speed in transformers was not measured."
    if row:
        rows.append(["prompt in transformers, tokens/s", *(figure(row[model]) for model in BOTH), times(row.ratio)])
        note = f"On {printable(found.device)}, {dash(found.threads, whole)} threads, both models by turns; medians."
    return Section("speed", "Size and speed", note, [Table(["", "dense", "pruned", "change"], rows)])


READINGS = {"right": "right", "note": "right", "misread": "would misread it", "refused": "does not load it"}


def engine_rows(readings: Iterable[Any]) -> list[tuple[str, str, str]]:
    """Engine, what it makes of a model, and why; of readings as far as this layercut knows both names."""
    return [
        (ENGINES[str(one.consumer)].title, READINGS[str(one.verdict)], printable(one.words))
        for one in readings
        if one.consumer in ENGINES and one.verdict in READINGS
    ]


def engines(run: RunFacts) -> Section:
    """Which engines read the result right, those that do alike in one row."""
    note = "By the rules known of each engine; --for restricts the search to cuts it reads right."
    check = run.export.check
    if how := check.how or check.logits:
        note += f" Verified in a fresh process: logits {printable(how)}."
    alike: dict[tuple[str, str], list[str]] = {}
    for engine, reads, why in engine_rows(run.summary.consumers):
        alike.setdefault((reads, why), []).append(engine)
    rows = [[reads, ", ".join(names), why] for (reads, why), names in alike.items()]
    return Section("engines", "Engines", note, [Table(["reads it", "engines", "why"], rows, 1)])


def later(run: RunFacts) -> Section:
    texts, more = [], list[Table]()
    for one in run.evaluations:
        if text := one.text:
            both, error = (figure(one.perplexity[model]) for model in BOTH), finite(one.ratio.standard_error)
            over = dash(one.ratio.value, times) + (f" ± {error:.2g}" if error is not None else "")
            names = source_name(text.source), whole(text.tokens), whole(text.window)
            texts.append([*names, *both, over, printable(one.date)])
        dense, pruned = (one.probes[model] for model in BOTH)
        keys = found_in_context("hidden keys", dense["keys"], pruned["keys"])
        lists = found_in_context("list values", dense.lists, pruned.lists)
        more += [probe_table([*skills(pruned.capabilities), *keys, *lists])]
        more += [] if one is run.scored else task_tables(one)
    note = f"By layercut evaluate {run.place}." if run.place else "Measured after the run."
    heads = ["text", "tokens", "window", "dense", "pruned", "over dense", "date"]
    return Section("evaluations", "Measured afterwards", note, [Table(heads, texts), *more])


def sources(run: RunFacts) -> Section:
    s, env, texts, search_ = run.summary, run.env, [], run.search
    for use, text, source in (
        ("calibration", search_.calibration, search_.calibration.source),
        ("tuning", run.heal.tuning.data, run.heal.tuning.data.source),
        ("evaluation", s.perplexity, s.perplexity.dataset),
    ):
        if text:
            texts.append([use, source_name(source), whole(text.tokens), printable(text.fingerprint) or "–"])
    cost = search_.cost
    passes = f"{dash(cost.layer_forwards, whole)} layer forwards, {dash(cost.layer_backwards, whole)} backwards"
    shared = s.perplexity.shared
    facts = [
        ["model", short_name(s.model)],
        ["search", f"{printable(search_.method)}, seed {search_.seed}, {passes}" if search_ else ""],
        ["evaluation text seen in search or tuning", f"{whole(shared.documents)} documents" if shared else ""],
        ["time", ", ".join(f"{name} {duration(seconds)}" for name, seconds in s.seconds.entries())],
        ["peak memory", size(s.peak_rss_bytes)],
        ["accelerator's peak memory", size(s.peak_device_bytes) if s.peak_device_bytes else ""],
        ["machine", printable(env.hardware or env.cpu)],
        ["date", printable(env.date)],
        ["versions", ", ".join(f"{printable(name)} {value}" for name, value in (s.versions or env.versions).entries())],
        ["command", command_line(env.command)],
    ]
    missing = {"tasks": main_tasks(run.scored), "speed": run.speed, "long context": positions(s),
               "probes": of(run, [abilities])}  # fmt: skip
    names = [name for name, there in missing.items() if not there]
    note = f"Not measured: {', '.join(names)}." if names else ""
    tables = [
        Table(["used for", "text", "tokens", "fingerprint"], texts, 1),
        Table(["", ""], [f for f in facts if f[1]], 1),
    ]
    return Section("provenance", "Data and provenance", note, tables)


PAGE = [search, stages, abilities, tasks, long_context, generation, probe_map, speed, bits, shares, frontier, engines,
        later, sources]  # fmt: skip
CARD = [stages, tasks, abilities, long_context, generation, speed, shares, frontier, sources]
