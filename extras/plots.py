"""The pictures of `report --plot`: panels a to d of each of its tables, or one alone (see PANELS)."""

import io
import math
import textwrap
from pathlib import Path
from statistics import geometric_mean, mean

from adapters import write_atomically
from extras.report import (Methods, bootstrap, by_step, gains, is_one_by_one, scores_of, standard_runs,
                           weakest_first)
from extras.rows import UserError

LANGUAGES = {
    "ar": "Arabic", "bg": "Bulgarian", "ca": "Catalan", "cs": "Czech", "da": "Danish", "de": "German",
    "el": "Greek", "es": "Spanish", "et": "Estonian", "eu": "Basque", "fi": "Finnish", "fr": "French",
    "hi": "Hindi", "hr": "Croatian", "ht": "Haitian Creole", "hu": "Hungarian", "id": "Indonesian",
    "it": "Italian", "ko": "Korean", "ml": "Malayalam", "ne": "Nepali", "nl": "Dutch", "pl": "Polish",
    "pt-BR": "Portuguese", "qu": "Quechua", "ro": "Romanian", "ru": "Russian", "sw": "Swahili", "ta": "Tamil",
    "th": "Thai", "tr": "Turkish", "ur": "Urdu", "vi": "Vietnamese", "zh": "Chinese", "zh-CN": "Chinese"}
COLOURS = {"standard": "#000000", "gu": "#0072B2", "lpft": "#009E73", "rand": "#E69F00", "fun": "#D55E00",
           "rev": "#CC79A7", "order": "#56B4E9", "none": "#B5A900", "full": "#888888"}  # Okabe and Ito's
STYLE = {"font.size": 9, "axes.titlesize": 9.5, "axes.spines.top": False, "axes.spines.right": False,
         "lines.linewidth": 1.5, "lines.markersize": 4, "svg.hashsalt": "0", "pdf.fonttype": 42}
UNDATED = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}  # the same runs give the same bytes
WIDTH = 8.3  # inches, 830 pixels of a README


def plot(groups: dict[str, Methods], path: Path, panel: str | None) -> None:
    """Draw panels a to d of each group, or one alone."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    heights = [height(methods, panel) for methods in groups.values()]
    ending = path.suffix[1:].lower()
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
        parts = figure.subfigures(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
        for part, (title, methods) in zip(parts, groups.items()):
            draw_group(part, title, methods, [[panel]] if panel else [["a", "d"], ["b", "d"], ["c", "d"]])
        buffer = io.BytesIO()
        figure.savefig(buffer, format=ending, dpi=160, metadata=UNDATED.get(ending))
    write_atomically(path, buffer.getvalue())


def draw_group(figure, title: str, methods: Methods, mosaic: list[list[str]]) -> None:
    """The panels of one group under its title and one legend, which maps need not."""
    from matplotlib.lines import Line2D

    styles = styles_of(methods)
    for letter, axes in figure.subplot_mosaic(mosaic).items():
        heading, draw = PANELS[letter]
        axes.set_title(f"$\\bf{{{letter}}}$  {heading}" if len(mosaic) > 1 else heading, loc="left")
        draw(axes, methods, styles)
    lines = [Line2D([], [], label=plain(label), **style) for label, style in styles.items()]
    figure.legend(handles=lines if mosaic != [["e"]] else [], ncols=min(5, 1 + 100 // max(map(len, styles))),
                  loc="outside upper left", frameon=False, alignment="left", title_fontsize="small",
                  title=plain(textwrap.fill(title, 150)))


def plain(text: str) -> str:
    """Not as a formula."""
    return text.replace("$", r"\$")


def height(methods: Methods, panel: str | None) -> float:
    """Of a group's picture, in inches: panel d has a line for each language and method, panel e a map for
    each method, two in a row."""
    languages = len(next(iter(methods.values()))[0]["scores"])
    dots = 1 + languages * max(0.2, 0.05 * len(methods))
    return {None: max(7.5, dots), "d": max(3, dots), "e": 3 * math.ceil(len(methods) / 2)}.get(panel, 3.2)


def styles_of(methods: Methods) -> dict[str, dict]:
    """By label: the method's colour; variants of one (of estimator, rate) differ in line and marker."""
    styles: dict[str, dict] = {}
    for label, runs in methods.items():
        colour = COLOURS.get(runs[0]["method"], "#8c564b")  # or of a user's own
        variant = sum(style["color"] == colour for style in styles.values()) % 4
        line, marker = [("-", "o"), ("--", "s"), (":", "D"), ("-.", "^")][variant]
        styles[label] = {"color": colour, "linestyle": line, "marker": marker}
    return styles


def draw_traces(axes, methods: Methods, styles: dict[str, dict]) -> None:
    for label, runs in methods.items():
        curve, colour = by_step(runs, "traces", "average"), styles[label]["color"]
        steps, values = list(curve), curve.values()
        axes.plot(steps, [*map(mean, values)], **styles[label] | {"marker": "."})
        axes.fill_between(steps, [*map(min, values)], [*map(max, values)], color=colour, alpha=0.2, lw=0)
    if "gu" in methods and methods["gu"][0]["order"]:
        steps = [step for step, _ in methods["gu"][0]["order"]]
        axes.plot(steps, [0.04] * len(steps), transform=axes.get_xaxis_transform(), marker="|", linestyle="",
                  color=COLOURS["gu"], markersize=7)
        axes.text(steps[-1], 0.04, " gu opens a block", transform=axes.get_xaxis_transform(), va="center",
                  color=COLOURS["gu"], fontsize="small")
    values = [event["average"] for runs in methods.values() for run in runs for event in run["traces"]]
    axes.set(yscale="log" if max(values, default=0) > 0 else "linear")
    axes.set(ymargin=0.12, xlabel="training step", ylabel="tr(F)")


def draw_orders(axes, methods: Methods, styles: dict[str, dict]) -> None:
    top = max([0, *(block for runs in methods.values() for run in runs for _, block in run["order"])])
    axes.plot([0, top], [top + 1, 1], linewidth=7, color="#dddddd")
    axes.annotate("GU's diagonal", (0.72 * top, 0.33 * top + 1), color="grey")
    for label, runs in methods.items():
        positions: dict[int, list[int]] = {}
        for run in filter(is_one_by_one, runs):
            for position, (_, block) in enumerate(run["order"], 1):
                positions.setdefault(block, []).append(position)
        blocks = sorted(positions)
        axes.plot(blocks, [mean(positions[block]) for block in blocks], **styles[label])
    axes.set(xlabel="block (0: bottom)", ylabel="place (1: opened first)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=True)


def draw_validation(axes, methods: Methods, styles: dict[str, dict]) -> None:
    for label, runs in methods.items():
        pale = styles[label] | {"linestyle": "", "alpha": 0.3, "markersize": 3}
        for run in runs:
            axes.plot(*score_over_trace([run]), **pale)
        axes.plot(*score_over_trace(runs), **styles[label])
    axes.set(xlabel="tr(F) per open block, as last measured", ylabel="English validation score")


def score_over_trace(runs: list[dict]) -> tuple[list[float], list[float]]:
    """Means over the runs: tr(F) as last measured before each validation, and its score."""
    traces = by_step(runs, "traces", "average")
    points = [(mean(traces[max(measured)]), mean(scores))
              for step, scores in by_step(runs, "validations", next(iter(runs[0]["scores"]["en"]))).items()
              if (measured := [earlier for earlier in traces if earlier <= step])]
    return [trace for trace, _ in points], [score for _, score in points]


def draw_gains(axes, methods: Methods, styles: dict[str, dict]) -> None:
    standard, scores = standard_runs(methods), next(iter(methods.values()))[0]["scores"]
    metric = next(iter(scores["en"]))
    languages = weakest_first([key for key in scores if key != "en"], standard, metric)
    gained = {label: found for label, runs in methods.items()
              if (found := gains(methods, runs, metric, languages))}
    if not gained:
        axes.set_axis_off()
        axes.text(0, 0.9, "no runs of standard with the same seeds", transform=axes.transAxes)
        return
    for place, (label, found) in enumerate(gained.items(), 1):
        by_language = [[[gain] for gain in by_seed] for by_seed in zip(*found)]
        for row, values in enumerate([found, *by_language]):  # each [seeds, languages]
            y = row + 0.8 * (place / (len(gained) + 1) - 0.5)
            axes.plot(mean(map(mean, values)), y, **styles[label])
            if len(values) > 1:
                axes.plot(bootstrap(values), [y, y], color=styles[label]["color"], linewidth=1)
    names = [f"{LANGUAGES.get(language, plain(language))} ({mean(scores_of(standard, language, metric)):.0f})"
             for language in languages]
    axes.set_yticks(range(len(names) + 1), ["all languages", *names])
    axes.set_ylim(len(names) + 0.5, -0.5)
    axes.get_yticklabels()[0].set_fontweight("bold")
    axes.tick_params(axis="y", length=0)
    for row in range(0, len(names) + 1, 2):
        axes.axhspan(row - 0.5, row + 0.5, color="#f2f2f2", zorder=0)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(xlabel="points over standard (its mean in brackets)")


def draw_blocks(axes, methods: Methods, styles: dict[str, dict]) -> None:
    """A map for each method, in the same colours; a dot where a block opens."""
    from matplotlib.colors import LogNorm

    maps = {label: found for label, runs in methods.items() if (found := block_map(runs))}
    values = [value for found in maps.values() for trace in found.values() for value in trace if value > 0]
    axes.set_axis_off()
    if not values:
        axes.text(0, 0.9, "no tr(F) above 0", transform=axes.transAxes)
        return
    rows = math.ceil(len(maps) / 2)
    for place, (label, found) in enumerate(maps.items()):
        row, column = divmod(place, 2)
        # two maps a row, with room for titles and labels
        part = axes.inset_axes([0.52 * column, 1 - (row + 0.9) / rows, 0.43, 0.75 / rows])
        cells = [*zip(*found.values())]  # [blocks, steps]
        mesh = part.pcolormesh([*found], range(len(cells)), cells, norm=LogNorm(min(values), max(values)))
        openings = [opening for run in methods[label] for opening in run["order"]]
        part.plot(*zip(*openings), "o", markersize=3, color="white", markeredgecolor="black", clip_on=False)
        part.set(title=plain(label), xlabel="training step", ylabel="block (0: bottom)")
        part.yaxis.get_major_locator().set_params(integer=True)
    axes.figure.colorbar(mesh, ax=axes, label="tr(F)")


def block_map(runs: list[dict]) -> dict[int, list[float]]:
    """By step, tr(F) of each block, open or not: the geometric mean over the runs, 0 if one of them has 0."""
    return {step: [geometric_mean(of_block) if min(of_block) > 0 else 0 for of_block in zip(*traces)]
            for step, traces in by_step(runs, "traces", "trace").items()}


PANELS = {"a": ("tr(F) per open block (band: all seeds)", draw_traces),
          "b": ("Mean place in the opening order", draw_orders),
          "c": ("Validation over tr(F) (pale: single seeds)", draw_validation),
          "d": ("Gain over standard, 95 % intervals", draw_gains),
          "e": ("tr(F) of each block (geometric mean over seeds; dot: opens)", draw_blocks)}
