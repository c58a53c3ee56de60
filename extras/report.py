"""Tables and pictures over finished runs, beside the paper's figures.

    python unfreeze.py report runs/*                        # tables: mean and deviation over seeds
    python unfreeze.py report runs/* --plot curves.png      # tr(F), opening orders, scores, gain by language
"""

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import math
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import correlation, mean, stdev

import torch

from adapters import write_atomically
from tasks import TASKS, UNSCHEDULED, UserError, preset
from unfreeze import SELECT, Settings, refuse


def report(arguments: list[str]) -> None:
    """Print a Markdown table for each group of comparable runs, and draw their curves with --plot."""
    parser = argparse.ArgumentParser(prog="unfreeze.py report", allow_abbrev=False)
    parser.error = refuse
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a run's folder")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="of tr(F), orders and scores")
    given = parser.parse_args(arguments)
    runs = [run for folder in given.folders if (run := read_run(folder))]
    if not runs:
        raise UserError("report found no finished run: name folders that hold a results.json, such as runs/*")
    groups = comparable(runs)
    if given.plot:
        plot(groups, given.plot)
    with contextlib.suppress(BrokenPipeError):  # `| head` has read enough
        for title, methods in groups.items():
            print(f"\n{title}\n")
            rows = table(methods)
            widths = [max(map(len, column)) for column in zip(*rows)]
            rows.insert(1, ["-" * width for width in widths])
            for row in rows:
                print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")
            print("", *notes(methods), sep="\n", flush=True)


# What runs of one table may differ in: what follows from the method, and what changes no result or is told
# apart otherwise.
BY_METHOD = ("lr", "k", "epochs", "steps", "decay", "order", "fisher_batches")
TOLD_APART = ("task", "method", "first", "adapter", "model", "language_adapters", "data", "languages",
              "language", "train_examples", "seed", "fisher_every", "fisher_labels", "device", "save_every",
              "out", "overwrite")


SOURCES = "language_adapter_sources"  # in results.json: by adapter, the hub's repository or its folder


def comparable(runs: list[dict]) -> dict[str, dict[str, list[dict]]]:
    """The runs by title, then by column: runs in one column differ in their seeds alone. `full` stands beside
    every kind of adapter. Raises UserError for two runs of one column and seed."""

    def shared(run: dict) -> tuple:
        facts = run["task"], run["model"], run["train_examples"], run.get("data")
        own = [f"{name} {value}" for name, value in run["settings"].items()
               if name not in (*BY_METHOD, *TOLD_APART)]
        return *facts, *sorted(run["scores"]), *own

    def adapters(run: dict) -> tuple[str, str, str]:
        stacked = run["language_adapters"]
        source = str(run["settings"]["language_adapters"]) if any(stacked.values()) else ""
        return run["adapter"], source, source and json.dumps([stacked, run[SOURCES]], sort_keys=True)

    kinds: dict[tuple, set[tuple]] = {}
    for run in runs:
        if run["method"] != "full":
            kinds.setdefault(shared(run), set()).add(adapters(run))
    tables: dict[tuple, list[dict]] = {}
    for run in runs:
        own = {adapters(run)}
        for kind in sorted(kinds.get(shared(run), own) if run["method"] == "full" else own):
            tables.setdefault((*shared(run), kind), []).append(run)
    groups: dict[str, dict[str, list[dict]]] = {}
    for (*_, (adapter, source, _)), runs in tables.items():
        run, examples = runs[0], runs[0]["train_examples"]
        same = {name: value for name, value in run["settings"].items() if value and name not in TOLD_APART
                and all(other["settings"][name] == value for other in runs)}
        parts = [run["task"], run["model"], adapter, f"{examples} training examples" if examples else "",
                 f"{len(run['scores'])} languages", f"above language adapters ({source})" if source else "",
                 *(f"{name.replace('_', ' ')} {value}" for name, value in same.items())]
        title = ", ".join(filter(None, parts))
        while title in groups:
            title += ", other data, languages or adapters"
        groups[title] = columns(runs)
    return groups


def columns(runs: list[dict]) -> dict[str, list[dict]]:
    """By method, in the order of SELECT, and by what was set otherwise for runs of one method."""
    order = [*SELECT, "full"]
    methods: dict[str, list[dict]] = {}
    for run in sorted(runs, key=lambda run: (order.index(run["method"]), method_of(run))):
        methods.setdefault(method_of(run), []).append(run)
    found: dict[str, list[dict]] = {}
    for method, runs in methods.items():
        other = [name for name in BY_METHOD if len({str(run["settings"][name]) for run in runs}) > 1]
        for run in runs:
            label = ", ".join([method, *(f"{name} {run['settings'][name]}" for name in other)])
            for twin in found.setdefault(label, []):
                if twin["seed"] == run["seed"]:
                    raise UserError(f"{twin['folder']} and {run['folder']} are both {label} with seed "
                                    f"{run['seed']}: name one of them")
            found[label].append(run)
    return found


def method_of(run: dict) -> str:
    """The method; for FUN the labels of its tr(F), if not sampled; the form, if not Algorithm 1's."""
    labels, batches = (run["settings"][name] for name in ("fisher_labels", "fisher_batches"))
    if labels == "official" and batches not in (None, 41):
        labels = f"official formula on {batches} batches"
    labels = f", {labels}" if run["method"] == "fun" and labels != "sampled" else ""
    return run["method"] + labels + ", top first" * (run["settings"]["first"] == "top")


def read_run(folder: Path) -> dict | None:
    """A run's results, checked as far as the report reads them, all settings there; None with a note if there
    are none, or of a task or method that this version does not know."""
    path = folder / "results.json"
    if not path.exists():
        print(f"note: {folder} holds no finished run and is left out")
        return None
    try:
        run = {"language_adapters": {}, SOURCES: {}} | json.loads(path.read_text(encoding="utf-8"))
        run["folder"] = folder
        assert all(isinstance(run[key], str) for key in ("task", "model", "adapter", "method"))
        if run["task"] not in TASKS or run["method"] not in [*SELECT, "full"]:
            print(f"note: {folder} is of {run['task']} by {run['method']}, unknown here, and is left out")
            return None
        own = run.get("settings", {"k": run.get("k"), "steps": run.get("steps")})
        older = {"eval_every": 0, "precision": "bf16" if own.pop("bf16", False) else "fp32"}  # ran so
        defaults = {entry.name: entry.default for entry in dataclasses.fields(Settings)[1:]}
        run["settings"] = defaults | older | own
        run.setdefault("train_examples", own.get("train_examples") or 0)  # 0: not recorded
        assert isinstance(run["settings"]["fisher_labels"], str) and isinstance(run.get("data", ""), str)
        metrics = run["scores"]["en"].keys()
        assert isinstance(run["average"], dict) and isinstance(run[SOURCES], dict)
        assert all(isinstance(adapter, str | None) for adapter in run["language_adapters"].values())
        for score in (*run["scores"].values(), run["average"] or run["scores"]["en"]):
            assert score.keys() == metrics and all(isinstance(score[name], (int, float)) for name in metrics)
        assert all(len([int(step), int(block)]) == 2 for step, block in run["order"])
        assert isinstance(run["seed"] + run["wall_seconds"] + run["train_examples"], (int, float))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError):
        raise UserError(f"{path} is damaged or of no task run: leave {folder} out, or run it again") from None
    run["log"] = read_log(folder / "log.jsonl", next(iter(metrics)))
    return run


def table(methods: dict[str, list[dict]]) -> list[list[str]]:
    """Scores by row and methods by column, mean ± sample standard deviation over seeds."""
    first = next(iter(methods.values()))[0]
    standard = standard_of(methods)
    metrics, targets = list(first["scores"]["en"]), [key for key in first["scores"] if key != "en"]
    weak = weakest_first(targets, standard, metrics[0])[: len(targets) // 2]
    rows = [["", *methods], ["seeds", *(str(len(runs)) for runs in methods.values())]]

    def add(name: str, cell: Callable) -> None:
        rows.append([name, *(cell(runs) for runs in methods.values())])

    def average(run: dict, metric: str) -> float:
        return run["average"].get(metric, math.nan)

    def gain(runs: list[dict], metric: str, languages: list[str]) -> str:
        return spread([*map(mean, gains(runs, standard, metric, languages))], "+")

    def paper(runs: list[dict], metric: str) -> str:
        figure = paper_figure(runs[0], metric)
        return figure if figure == "-" or not any(map(departures, runs)) else f"{figure} *"

    def difference(runs: list[dict], metric: str) -> str:
        figure = paper(runs, metric)
        return "-" if figure == "-" or "*" in figure else \
            f"{mean(average(run, metric) for run in runs) - float(figure.split('±')[0]):+.1f}"

    for name in BY_METHOD:
        values = [str(runs[0]["settings"][name]) for runs in methods.values()]
        if len({*values}) > 1 and name != "order":
            rows.append([name.replace("_", " "), *values])
    for metric in metrics:
        of = "" if metric == metrics[0] else f", {metric}"
        optimistic = " (optimistic)" if is_selected_on_test(methods) else ""
        add(f"English, {metric}{optimistic}",
            lambda runs: spread([run["scores"]["en"][metric] for run in runs]))
        add(f"mean of targets, {metric}", lambda runs: spread([average(run, metric) for run in runs]))
        add(f"over standard{of}", lambda runs: gain(runs, metric, targets))
        add(f"its 95 % interval{of}", lambda runs: interval(gains(runs, standard, metric, targets)))
        add(f"in the weaker half{of}", lambda runs: gain(runs, metric, weak))
        for name, cell in (("the paper's", paper), ("difference", difference)):
            if any(cell(runs, metric) != "-" for runs in methods.values()):
                add(name + of, lambda runs: cell(runs, metric))
    by_language = {method: {language: mean(run["scores"][language][metrics[0]] for run in runs)
                            for language in targets} for method, runs in methods.items()}
    lowest = [min(scores, key=scores.get, default=None) for scores in by_language.values()]
    rows.append(["lowest language", *(f"{language} {scores[language]:.1f}" if language else "-"
                                      for language, scores in zip(lowest, by_language.values()))])
    for language in targets:
        add(language, lambda runs: spread([run["scores"][language][metrics[0]] for run in runs]))
    orders = {method: {opening_order(run) for run in runs} for method, runs in methods.items()}
    rows.append(["opened", *(found.pop() if len(found) == 1 else "see below" for found in orders.values())])
    taus = [[tau for run in runs for tau in top_down(run)] for runs in methods.values()]
    rows.append(["tau with top-down", *(f"{mean(values):.2f}" if values else "-" for values in taus)])
    add("tr(F) first, highest, last", trace_curve)
    add("seconds", lambda runs: f"{mean(run['wall_seconds'] for run in runs):.0f}")
    return rows


def standard_of(methods: dict[str, list[dict]]) -> list[dict]:
    """What gains are held against: none if standard training was run in several settings."""
    found = [runs for runs in methods.values() if runs[0]["method"] == "standard"]
    return found[0] if len(found) == 1 else []


def weakest_first(languages: list[str], runs: list[dict], metric: str) -> list[str]:
    return sorted(languages, key=lambda language: sum(run["scores"][language][metric] for run in runs))


def gains(runs: list[dict], standard: list[dict], metric: str, languages: list[str]) -> list[list[float]]:
    """By seed and language, what a run scores above the standard run of its seed."""
    scores = {run["seed"]: run["scores"] for run in standard if languages and runs[0]["method"] != "standard"}
    pairs = [(run["scores"], scores[run["seed"]]) for run in runs if run["seed"] in scores]
    return [[ours[language][metric] - theirs[language][metric] for language in languages]
            for ours, theirs in pairs]


def interval(gains: list[list[float]]) -> str:
    """Of the mean gain, by the bootstrap: seeds and languages are drawn anew, with replacement."""
    if len(gains) < 2:
        return "-"
    values, generator = torch.tensor(gains).double(), torch.Generator().manual_seed(0)  # [seeds, languages]
    seeds = torch.randint(values.shape[0], (10_000, values.shape[0], 1), generator=generator)
    languages = torch.randint(values.shape[1], (10_000, 1, values.shape[1]), generator=generator)
    means = values[seeds, languages].mean((1, 2))  # [10,000]
    return f"{means.quantile(0.025):+.1f} to {means.quantile(0.975):+.1f}"


def spread(values: list[float], sign: str = "") -> str:
    """Mean ± sample standard deviation; the mean alone of a single value, a dash of none."""
    if not values:
        return "-"
    return f"{mean(values):{sign}.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def opening_order(run: dict) -> str:
    """The blocks in the order of opening, 0 at the bottom."""
    if len(run["order"]) > 1 and len({step for step, _ in run["order"]}) == 1:
        return f"all at step {run['order'][0][0]}"
    return " ".join(str(block) for _, block in run["order"]) or "none"


def top_down(run: dict) -> list[float]:
    """Kendall's tau of the opening order with GU's, if the blocks opened one after the other."""
    pairs = list(itertools.combinations([block for _, block in run["order"]], 2))
    if not pairs or len({step for step, _ in run["order"]}) == 1:
        return []
    return [mean(1 if first > second else -1 for first, second in pairs)]


def notes(methods: dict[str, list[dict]]) -> Iterator[str]:
    """The lines under a table: orders that differ by seed, correlations, language adapters, and in what the
    runs differ from those behind the paper's figures."""
    for method, runs in methods.items():
        for run in runs if len({opening_order(run) for run in runs}) > 1 else []:
            yield f"{method}, seed {run['seed']}, opened {opening_order(run)}"
    yield from correlations(methods)
    firsts = {method: runs[0] for method, runs in methods.items()}
    for run in [run for run in firsts.values() if any(run["language_adapters"].values())][:1]:
        yield "language adapters: " + ", ".join(f"{run[SOURCES].get(adapter, adapter)} for {language}"
                                                for language, adapter in run["language_adapters"].items())
    if is_selected_on_test(methods):
        yield "optimistic: English is tested on COPA's validation split, which selects the weights"
    yield from paper_notes(methods, firsts)


def paper_notes(methods: dict[str, list[dict]], firsts: dict[str, dict]) -> Iterator[str]:
    """What to know about the paper's figures in a table; firsts: a run of each column."""
    metric = next(iter(next(iter(firsts.values()))["scores"]["en"]))
    known = {method: run for method, run in firsts.items() if paper_figure(run, metric) != "-"}
    apart: dict[tuple, list[str]] = {}
    for method in known:
        found = dict.fromkeys(itertools.chain(*map(departures, methods[method])))
        apart.setdefault(tuple(found), []).append(method)
    for what, names in apart.items():
        if what:
            yield f"* {'; '.join(names)}: not the paper's setting, but {', '.join(what)}"
    for method, run in firsts.items():
        released = run | {"settings": run["settings"] | {"first": "top"}}
        if method not in known and paper_figure(released, metric) != "-":
            yield f"{method}: Algorithm 1's form; the paper has the released form (--first top)"
        elif method in known and run["method"] in TOP_FIRST:
            yield f"{method}: the released form, of which the paper's figure is"
        estimator = run["settings"]["fisher_labels"], run["settings"]["fisher_batches"]
        if method in known and run["method"] == "fun" and estimator != ("official", 41):
            yield f"{method}: the paper's tr(F) is the official formula on 41 batches"
    run = next(iter(known.values()), {})
    if run.get("train_examples") in LOW_SIZES:
        yield "the paper's low data are the first rows, for every seed; here a sample by seed"
    if run.get("task") == "xcopa":
        yield ("the paper's XCOPA has its own questions, wrong in part of th, tr, sw, id and it; here they "
               "are English COPA's")
    if any(run["method"] == "full" for run in known.values()):
        yield "full: the paper does not give its learning rate"


def is_selected_on_test(methods: dict[str, list[dict]]) -> bool:
    """Whether English is tested on the split that selects: COPA's own test labels are not on the hub."""
    return any(run["task"] == "xcopa" and run["settings"]["data"] is None
               for runs in methods.values() for run in runs)


def correlations(methods: dict[str, list[dict]]) -> Iterator[str]:
    """Spearman's correlation of tr(F) per open block with scores, over the runs of two methods or more whose
    tr(F) is measured alike. Each run is a point: x is tr(F) at the last measurement up to the weights kept
    (as in the paper's Figure 4), or the highest up to there, y their validation score or mean of targets."""
    alike: dict[tuple, list[tuple]] = {}
    for method, runs in methods.items():
        for run in runs:
            traces, validations = run["log"]
            metric = next(iter(run["scores"]["en"]))
            kept = max(validations, key=lambda event: event[metric], default={"step": -1})
            curve = [event["average"] for event in traces if event["step"] <= kept["step"]]
            if curve and run["average"]:
                way = run["settings"]["fisher_labels"], str(run["settings"]["fisher_batches"])
                point = method, curve[-1], max(curve), kept[metric], run["average"][metric]
                alike.setdefault(way, []).append(point)
    for (labels, _), points in alike.items():
        names, last, highest, validation, targets = zip(*points)
        if len({*names}) > 1 and len(points) > 2:
            both = [f"{spearman(traces, validation):.2f} and {spearman(traces, targets):.2f}"
                    for traces in (last, highest)]
            yield ("Spearman's correlation of tr(F) per open block with validation and mean of targets "
                   f"{both[0]}, of its highest {both[1]} ({len(points)} runs, {labels} labels)")


def spearman(first: tuple, second: tuple) -> float:
    """The correlation of the ranks, equals with their mean rank; NaN where all are equal."""
    ranks = [[sum(other < value for other in values) + sum(other == value for other in values) / 2
              for value in values] for values in (first, second)]
    return correlation(*ranks) if all(len({*values}) > 1 for values in ranks) else math.nan


def trace_curve(runs: list[dict]) -> str:
    """Of tr(F) per open block, mean over the runs: the first value, the highest and its step, the last."""
    curve = mean_curve([traces for traces, _ in (run["log"] for run in runs) if traces], "average")
    if not curve:
        return "-"
    highest = max(curve, key=curve.get)
    return f"{curve[min(curve)]:.2g}, {curve[highest]:.2g} at {highest}, {curve[max(curve)]:.2g}"


def mean_curve(logs: list[list[dict]], name: str) -> dict[int, float]:
    """By step, the mean over the runs of one quantity, at the steps that all of them have."""
    curves = [{event["step"]: event[name] for event in events} for events in logs]
    return {step: mean(curve[step] for curve in curves)
            for step in (curves or [{}])[0] if all(step in curve for curve in curves)}


COLOURS = ("#000000", "#E69F00", "#D55E00", "#56B4E9", "#009E73", "#0072B2", "#CC79A7", "#F0E442", "#999999")


def plot(groups: dict[str, dict[str, list[dict]]], path: Path) -> None:
    """Four panels per group: tr(F) per open block, opening orders, validation score over tr(F) (the paper's
    Figures 3, 5 and 4), and the gain by language. Curves come from log.jsonl; runs without one lack them."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    figure, panels = pyplot.subplots(2 * len(groups), 2, figsize=(12, 8 * len(groups)), squeeze=False)
    panels = panels.reshape(-1, 4)
    names = dict.fromkeys(method for methods in groups.values() for method in methods)
    colours = dict(zip(names, itertools.cycle(COLOURS)))  # a method's in every group
    for (title, methods), (curve, orders, scores, gained) in zip(groups.items(), panels):
        for method, runs in methods.items():
            draw(runs, standard_of(methods), curve, orders, scores, gained,
                 {"color": colours[method], "label": method})
        top = max([0, *(block for runs in methods.values() for run in runs for _, block in run["order"])])
        orders.plot([0, top], [top, 0], linestyle=":", color="grey", label="GU's diagonal")
        curve.set(xlabel="step", ylabel="tr(F) per open block", yscale="log")
        orders.set(xlabel="block (0: bottom)", ylabel="mean position in the opening order")
        scores.set(xlabel="tr(F) per open block", ylabel="validation score")
        gained.set(xlabel="language, standard's weakest first", ylabel="mean score over standard's")
        gained.axhline(0, color="grey", linewidth=0.8)
        gained.tick_params(axis="x", labelsize="small", rotation=90)
        for panel in (curve, orders, scores, gained):
            if panel.get_legend_handles_labels()[0]:
                panel.legend(fontsize="small")
        curve.set_title(textwrap.fill(title, 80), loc="left", fontsize="medium")
    figure.tight_layout()
    buffer = io.BytesIO()
    try:
        figure.savefig(buffer, format=path.suffix[1:] or "png", dpi=80)
    except ValueError:
        raise UserError(f"--plot {path}: matplotlib writes no {path.suffix}; name a .png") from None
    pyplot.close(figure)
    write_atomically(path, buffer.getvalue())


def draw(runs: list[dict], standard: list[dict], curve, orders, scores, gained, style: dict) -> None:
    """One method, means over its runs: the curve of tr(F) with each run's, the position of each block in the
    order of opening, the validation scores over tr(F), and the gain of each language."""
    metric, faint = next(iter(runs[0]["scores"]["en"])), style | {"alpha": 0.25, "label": None}
    if all(len({step for step, _ in run["order"]}) > 1 for run in runs):  # one block after the other
        positions: dict[int, list[int]] = {}
        for run in runs:
            for position, (_, block) in enumerate(run["order"]):
                positions.setdefault(block, []).append(position)
        orders.plot(sorted(positions), [mean(positions[block]) for block in sorted(positions)], marker="o",
                    **style)
    languages = weakest_first([key for key in runs[0]["scores"] if key != "en"], standard, metric)
    if paired := gains(runs, standard, metric, languages):
        gained.plot(languages, [*map(mean, zip(*paired))], marker="o", markersize=4, linewidth=0.8, **style)
    logs = [run["log"] for run in runs if run["log"][0]]
    for traces, _ in logs:
        curve.plot([event["step"] for event in traces], [event["average"] for event in traces], **faint)
    if trace := mean_curve([traces for traces, _ in logs], "average"):
        curve.plot([*trace], [*trace.values()], **style)
        points = [(trace[max(measured)], score)
                  for step, score in mean_curve([validations for _, validations in logs], metric).items()
                  if (measured := [earlier for earlier in trace if earlier <= step + 1])]
        scores.plot([x for x, _ in points], [y for _, y in points], marker="o", markersize=3, **style)


def read_log(path: Path, metric: str) -> tuple[list[dict], list[dict]]:
    """The measurements of tr(F) with open blocks and the validations in a run's log; none without a log."""
    try:
        events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        traces = [event for event in events if event["event"] == "fisher" and event["trainable"]]
        validations = [event for event in events if event.get("split") == "validation"]
        for event in traces:  # logs of earlier versions have another average
            event["average"] = mean(event["trace"][block] for block in event["trainable"])
        numbers = [event[name] for event in traces for name in ("step", "average")]
        numbers += [event[name] for event in validations for name in ("step", metric)]
        assert all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers)
        return traces, validations
    except FileNotFoundError:
        return [], []
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError):
        raise UserError(f"{path} is damaged: leave {path.parent} out, or run it again") from None


# ------------------------------------------------------------------------------------------------------------
# The paper's results
# ------------------------------------------------------------------------------------------------------------

# Mean over the target languages, 4 seeds: MLQA F1 and EM, XQuAD F1 and EM, XCOPA, XNLI.
PAPER = {
    ("bert", "none", "full"): "56.85 - 63.33 - 53.39 63.60",
    ("bert", "pfeiffer", "standard"): "55.40±0.94 37.07±0.72 60.63±1.04 43.90±0.85 53.99±0.49 57.78±1.68",
    ("bert", "pfeiffer", "rand"): "55.93±0.21 37.54±0.31 61.68±0.33 47.42±0.55 53.84±0.71 59.87±0.96",
    ("bert", "pfeiffer", "gu"): "57.37±0.32 38.27±0.27 63.48±0.22 46.76±0.44 54.29±0.60 61.67±1.04",
    ("bert", "pfeiffer", "fun"): "57.33±0.51 38.29±0.63 63.25±0.26 49.09±0.48 53.98±0.64 61.36±0.51",
    ("bert", "pfeiffer", "rev"): "49.09 - 53.43 - - 55.67",
    ("xlm-roberta", "none", "full"): "62.59 - 71.98 - 54.99 73.43",
    ("xlm-roberta", "pfeiffer", "standard"):
        "61.31±0.46 42.10±0.42 70.09±0.60 53.77±0.40 55.93±1.58 73.31±0.44",
    ("xlm-roberta", "pfeiffer", "rand"): "61.36±1.69 41.59±1.96 69.99±1.47 52.06±2.04 57.05±0.42 72.68±0.56",
    ("xlm-roberta", "pfeiffer", "gu"): "63.47±0.12 43.55±0.11 73.04±0.22 55.93±0.15 58.24±1.11 73.44±0.24",
    ("xlm-roberta", "pfeiffer", "fun"): "63.10±0.79 43.37±0.51 72.34±0.40 55.21±0.63 58.11±0.94 73.13±0.53",
    ("xlm-roberta", "pfeiffer", "rev"): "57.59 - 65.44 - - 72.50",
    ("bert", "lora", "standard"): "55.55 - 61.53 - 53.43 65.27",
    ("bert", "lora", "gu"): "56.52 - 63.12 - 54.67 65.33",
    ("bert", "lora", "fun"): "56.65 - 62.92 - - 65.32",
    ("xlm-roberta", "lora", "standard"): "59.40 - 68.92 - 55.46 72.98",
    ("xlm-roberta", "lora", "gu"): "63.11 - 72.27 - 55.07 73.43",
    ("xlm-roberta", "lora", "fun"): "62.62 - 72.13 - - 73.65",
}
PAPER_LOW_DATA = {  # XLM-R with adapters: standard, GU, FUN
    ("xnli", "accuracy"): {1000: "52.75 52.86 52.29", 5000: "64.22 64.15 64.10", 10000: "65.80 65.91 66.26"},
    ("xquad", "f1"): {1000: "44.11 48.42 47.67", 5000: "57.20 59.88 60.72", 10000: "61.75 65.28 65.16"},
}
LOW_SIZES = (1_000, 5_000, 10_000)  # Table 4's
TRAINING_SIZES = {"mnli": 392_702, "squad": 87_599, "copa": 400}


PAPER_MODELS = ("FacebookAI/xlm-roberta-base", "xlm-roberta-base", "google-bert/bert-base-multilingual-cased",
                "bert-base-multilingual-cased")
TOP_FIRST = ("fun", "rand", "rev")  # the released code opens the top block at step 0: its figures are of that


def paper_figure(run: dict, metric: str) -> str:
    """The paper's mean over the target languages for a run's task, model, adapter and method, "-" if none.
    Models other than mBERT are held against XLM-R, amounts other than Table 4's against all of the data."""
    task, method, examples = run["task"], run["method"], run["train_examples"]
    adapter = "none" if method == "full" else run["adapter"]
    if method in TOP_FIRST and run["settings"]["first"] != "top":
        return "-"
    if examples in LOW_SIZES:
        is_there = (model_of(run), adapter) == ("xlm-roberta", "pfeiffer")
        figures = PAPER_LOW_DATA.get((task, metric), {}).get(examples, "") if is_there else ""
        return dict(zip(("standard", "gu", "fun"), figures.split())).get(method, "-")
    columns = ("mlqa f1", "mlqa em", "xquad f1", "xquad em", "xcopa accuracy", "xnli accuracy")
    row = PAPER.get((model_of(run), adapter, method), "")
    return dict(zip(columns, row.split())).get(f"{task} {metric}", "-")


def model_of(run: dict) -> str:
    return "bert" if "bert-base-multilingual" in run["model"] else "xlm-roberta"


def departures(run: dict) -> list[str]:
    """What sets a run of a task of the paper apart from the setting of the paper's figure."""
    task, settings, scores = TASKS[run["task"]], run["settings"], run["scores"]
    size = TRAINING_SIZES[task.training_set]
    examples = run["train_examples"] or size
    adapter = "lora" if run["adapter"] == "lora" else "pfeiffer"
    names = ("epochs", "lr", "batch_size", "decay", "k")
    theirs = dict(zip(names, preset(run["task"], model_of(run), adapter, run["method"], examples)))
    lacking = [language for language in scores if run["language_adapters"].get(language) != language]
    found = {
        f"model {run['model']}": run["model"] not in PAPER_MODELS,
        "data of a folder": settings["data"] is not None,
        f"{examples:,} training examples": examples not in (*LOW_SIZES, size),
        f"{len(scores)} languages" + " (others)" * (len(scores) == len(task.languages)):
            {*scores} != {*task.languages},
        f"{settings['test_examples']} test examples": settings["test_examples"] is not None,
        f"max length {settings['max_length']}": settings["max_length"] != task.max_length}
    if run["method"] != "full":
        source, own = str(settings["language_adapters"]), len(lacking) < len(scores)
        found["no language adapter" + (f" for {' '.join(lacking)}" if own else "s")] = bool(lacking)
        places = run["language_adapter_sources"].items()  # the paper has trained some for mBERT itself
        theirs_too = ("it", "ta", "th") if model_of(run) == "bert" else ()
        others = [language for language, place in places if not place.startswith("AdapterHub/")]
        found[f"language adapters {source}"] = own and (
            not source.startswith("auto") or not {*others} <= {*theirs_too})
    for name, value in theirs.items():
        own = f"{settings['steps']} steps" if name == "epochs" and settings["epochs"] is None else \
            f"{name.replace('_', ' ')} {settings[name]}"
        found[own] = settings[name] != value and (name != "k" or run["method"] not in UNSCHEDULED)
    return [what for what, differs in found.items() if differs]
