"""The pictures of a report, each as SVG that takes its ink from the page, so that they suit light, dark and paper.

All are drawn from the report's numbers (`training/evaluation.py`, `figures`), and show nothing that these do not hold.
"""

import io
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure

from training.plots import CLASSES_COUNTED, CLASSES_NAMED, LONGEST_NAME, confusion_figure

INK = "#0a0b0c"
"""Stands for the page's colour of text, whatever that is."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, searchable, and in any script that the reader's machine has
    "svg.hashsalt": "report",  # the same numbers, the same bytes
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "text.parse_math": False,  # a class may be called "$"
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}
SHALLOW_TO_DEEP = LinearSegmentedColormap.from_list("stages", ["#12a594", "#3b82f6", "#8b5cf6", "#d6478d"])
COUNTED = LinearSegmentedColormap.from_list("counted", [(0.23, 0.51, 0.96, 0.0), (0.13, 0.38, 0.86, 1.0)])
SIGNED = LinearSegmentedColormap.from_list(
    "signed", [(0.15, 0.39, 0.92, 1.0), (0.5, 0.5, 0.5, 0.0), (0.86, 0.24, 0.18, 1.0)]
)
SELECTIVITY_BINS = 25


def pictures(figures: dict[str, Any]) -> dict[str, str]:
    """All pictures of a report as SVG elements, by name."""
    drawers: dict[str, Callable[[dict[str, Any]], Figure]] = {
        "accuracy": _accuracy,
        "agreement": _agreement,
        "confusion": _confusion,
        "reliability": _reliability,
        "weights": _weights,
        "shares": _shares,
        "selectivity": _selectivity,
    }
    with rc_context(STYLE):
        return {name: to_svg(draw(figures), name) for name, draw in drawers.items()}


def stage_colours(stages: int) -> list[str]:
    """A colour a stage, from shallow to deep, that shows on white and on black."""
    places = np.linspace(0, 1, stages) if stages > 1 else np.ones(1)
    return ["#" + "".join(f"{round(255 * value):02x}" for value in SHALLOW_TO_DEEP(place)[:3]) for place in places]


def to_svg(figure: Figure, name: str) -> str:
    """A figure as an SVG element to be put in a page; `name` keeps its ids apart from other figures'."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # it is the reader's browser that draws it
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'id="|(?<=href=")#|(?<=url\()#', lambda found: f"{found[0]}{name}-", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)


def _names(figures: dict[str, Any]) -> list[str]:
    return [stage["name"] for stage in figures["stages"]]


def _accuracy(figures: dict[str, Any]) -> Figure:
    """What each stage's reading gets right, and what the whole loses without the stage."""
    stages, fused = figures["stages"], 100 * figures["fused"]["accuracy"]
    rows, colours = np.arange(len(stages)), stage_colours(len(stages))
    figure = Figure(figsize=(8.6, 0.9 + 0.36 * len(stages)), layout="constrained")
    left, *others = figure.subplots(1, 1 if len(stages) == 1 else 2, sharey=True, squeeze=False)[0]
    values = [100 * stage["accuracy"] for stage in stages]
    left.barh(rows, values, color=colours, height=0.66)
    for row, value in zip(rows, values, strict=True):
        left.text(1.5, row, f"{value:.1f}", va="center", color="white" if value > 12 else INK)
    left.axvline(fused, color=INK, lw=1.2, ls="--")
    left.set(title=f"Stage's reading right, % (dashed: fused, {fused:.1f})", xlim=(0, 100))
    for right in others:  # of a single stage nothing would be left
        changes = [100 * stage["accuracy_without"] - fused for stage in stages]
        bars = right.barh(rows, changes, color=colours, height=0.66)
        right.bar_label(bars, [f"{value:+.2f}" for value in changes], padding=3)
        right.axvline(0, color=INK, lw=0.8)
        right.margins(x=0.25)
        right.set(title="Fused accuracy without the stage's contribution, points")
    left.set_yticks(rows, _names(figures))
    left.invert_yaxis()
    return figure


def _agreement(figures: dict[str, Any]) -> Figure:
    """How many stages say what the whole does, and how often that is right then."""
    rows = figures["agreement"]["by_stages_that_agree"]
    figure = Figure(figsize=(8.6, 2.3), layout="constrained")
    axes = figure.subplots()
    bars = axes.bar([row["stages"] for row in rows], [row["images"] for row in rows], color=SHALLOW_TO_DEEP(0.34))
    right = ["" if row["accuracy"] is None else f"{100 * row['accuracy']:.1f} %" for row in rows]
    axes.bar_label(bars, right, padding=2)
    axes.set_xticks([row["stages"] for row in rows])
    axes.margins(y=0.15)
    axes.set(xlabel="stages whose reading is the answer", ylabel="images")
    return figure


def _confusion(figures: dict[str, Any]) -> Figure:
    names = [entry["name"] for entry in figures["classes"]]
    return confusion_figure(np.array(figures["confusion"]["counts"]), names, COUNTED)


def _reliability(figures: dict[str, Any]) -> Figure:
    """A reliability diagram of the fused confidence and of each stage's reading, with the images of each bin below."""
    outputs = [("fused", figures["fused"], INK)]
    outputs += [
        (s["name"], s, colour)
        for s, colour in zip(figures["stages"], stage_colours(len(figures["stages"])), strict=True)
    ]
    columns = min(5, len(outputs))
    blocks = -(-len(outputs) // columns)
    figure = Figure(figsize=(8.8, 2.5 * blocks), layout="constrained")
    grid = figure.subplots(2 * blocks, columns, squeeze=False, sharex=True, height_ratios=[3, 1] * blocks)
    for place in range(columns * blocks):
        block, column = divmod(place, columns)
        above, below = grid[2 * block, column], grid[2 * block + 1, column]
        if place < len(outputs):
            _reliability_of(*outputs[place], above, below)
        else:
            above.set_axis_off()
            below.set_axis_off()
        for axes in (above, below):
            if column:
                axes.set_yticklabels([])
    for block in range(blocks):
        grid[2 * block, 0].set_ylabel("accuracy")
    figure.supxlabel("confidence", fontsize="medium")
    return figure


def _reliability_of(name: str, output: dict[str, Any], colour: str, above: Axes, below: Axes) -> None:
    filled = [row for row in output["reliability"] if row["images"]]
    middles = [(row["from"] + row["to"]) / 2 for row in filled]
    width = output["reliability"][0]["to"]
    above.plot([0, 1], [0, 1], color=INK, lw=0.8, ls=":")
    above.bar(middles, [row["accuracy"] for row in filled], 0.9 * width, color=colour, alpha=0.35)
    above.plot(
        [row["confidence"] for row in filled], [row["accuracy"] for row in filled], "o-", color=colour, lw=1, ms=3
    )
    above.set(
        title=f"{name}\nECE {100 * output['ece']:.1f} %",
        xlim=(0, 1),
        ylim=(0, 1),
        xticks=[0, 0.5, 1],
        yticks=[0, 0.5, 1],
    )
    most = max(row["images"] for row in filled)
    below.bar(middles, [row["images"] / most for row in filled], 0.9 * width, color=colour)
    below.set(ylim=(0, 1.1), yticks=[], xticks=[0, 0.5, 1])


def _weights(figures: dict[str, Any]) -> Figure:
    """Raw attention weights, a row a stage, a column a class (one column where all classes share them)."""
    weights = np.array([stage["weights"] for stage in figures["stages"]])
    names = [entry["name"] for entry in figures["classes"]]
    if (weights == weights[:, :1]).all():
        weights, names = weights[:, :1], ["all classes"]
    stages, classes = weights.shape
    figure = Figure(figsize=(float(np.clip(1.8 + 0.62 * classes, 3, 8.8)), 1.3 + 0.36 * stages), layout="constrained")
    axes = figure.subplots()
    most = float(np.abs(weights).max()) or 1.0
    picture = axes.imshow(
        weights, cmap=SIGNED, norm=TwoSlopeNorm(0, -most, most), aspect="auto", interpolation="nearest"
    )
    if classes <= CLASSES_COUNTED / 2:
        for (stage, column), value in np.ndenumerate(weights):
            ink = "white" if abs(value) > 0.75 * most else INK
            axes.text(column, stage, f"{value:.2f}", ha="center", va="center", color=ink, fontsize="small")
    every = max(1, -(-classes // (CLASSES_NAMED // 3)))
    axes.set_xticks(range(0, classes, every), [_short(n) for n in names[::every]], rotation=0 if classes == 1 else 90)
    axes.set_yticks(range(stages), _names(figures))
    axes.spines[:].set_visible(False)
    figure.colorbar(picture, ax=axes, shrink=0.9, label="weight")
    return figure


def _shares(figures: dict[str, Any]) -> Figure:
    """How the shares of each stage spread over the images: quantiles, and the mean, which is the importance."""
    stages, colours = figures["stages"], stage_colours(len(figures["stages"]))
    figure = Figure(figsize=(8.6, 0.9 + 0.4 * len(stages)), layout="constrained")
    axes = figure.subplots()
    ends = ("whislo", "q1", "med", "q3", "whishi")
    boxes = [dict(zip(ends, stage["share"].values(), strict=True)) | {"mean": stage["importance"]} for stage in stages]
    drawn = axes.bxp(
        boxes, positions=range(len(stages)), orientation="horizontal", widths=0.6, showfliers=False, showmeans=True,
        patch_artist=True,
        boxprops={"edgecolor": INK}, medianprops={"color": INK, "lw": 1.6},
        whiskerprops={"color": INK}, capprops={"color": INK},
        meanprops={"marker": "D", "markerfacecolor": "white", "markeredgecolor": INK, "markersize": 5},
    )  # fmt: skip
    for box, colour in zip(drawn["boxes"], colours, strict=True):
        box.set_facecolor(colour)
    axes.set_yticks(range(len(stages)), _names(figures))
    axes.invert_yaxis()
    axes.set(
        xlim=(0, None), xlabel="share of an answer (box: middle half of the images; whiskers: 5 to 95 %; diamond: mean)"
    )
    return figure


def _selectivity(figures: dict[str, Any]) -> Figure:
    """Distribution of the class selectivity of each stage's channels (AFINets, Fig. 4)."""
    stages, colours = figures["stages"], stage_colours(len(figures["stages"]))
    figure = Figure(figsize=(8.6, 2.8), layout="constrained")
    axes = figure.subplots()
    edges = np.linspace(0, 1, SELECTIVITY_BINS + 1)
    for stage, colour in zip(stages, colours, strict=True):
        values = np.array(stage["selectivity"]["channels"])
        if not len(values):
            continue
        counts = np.histogram(values, edges)[0] / len(values)
        axes.stairs(100 * counts, edges, color=colour, lw=1.6, label=f"{stage['name']}, mean {values.mean():.3f}")
        axes.stairs(100 * counts, edges, color=colour, alpha=0.12, fill=True)
        axes.axvline(values.mean(), color=colour, lw=1, ls="--")
    axes.set(xlim=(0, 1), xlabel="class selectivity of a channel", ylabel="of the stage's channels, %")
    axes.legend(frameon=False, labelcolor=INK)
    return figure


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
