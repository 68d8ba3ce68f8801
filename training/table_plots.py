"""The paper's tables as pictures: rows beside one another, or the runs of one row in their order (Fig. 4)."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from training.files import replacing
from training.results import Outcome, Results, Summary, learned_weights

PAPER = "black"


def plot_table(results: Results, outcomes: Sequence[Outcome], path: Path) -> None:
    """Every finished cell as a dot, mean and standard deviation, and the paper where it may be compared."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    if results.table.picture == "runs":
        _plot_runs(figure, results, outcomes)
    else:
        _plot_rows(figure.subplots(), results, outcomes)
    figure.suptitle(f"{results.table.title} ({results.label})", fontsize="medium")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


def _plot_rows(axes: Axes, results: Results, outcomes: Sequence[Outcome]) -> None:
    summaries = results.summaries(outcomes)
    labels = list(dict.fromkeys(row.x for row in results.table.rows))
    series = list(dict.fromkeys(row.series for row in results.table.rows))
    for number, name in enumerate(series):
        mine = [summary for summary in summaries if summary.row.series == name]
        shift = 0.16 * (number - (len(series) - 1) / 2)
        _plot_series(axes, mine, [labels.index(s.row.x) + shift for s in mine], f"C{number}", name)
    for x, label in enumerate(labels):
        if not any(s.accuracies for s in summaries if s.row.x == label):
            axes.text(x, 0.02, "not run", transform=axes.get_xaxis_transform(), ha="center", color="grey", rotation=90)
    axes.set_xticks(range(len(labels)), labels)
    axes.set(xlim=(-0.6, len(labels) - 0.4), xlabel=results.table.axis, ylabel="test accuracy, %")
    axes.grid(alpha=0.3, axis="y")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")


def _plot_series(axes: Axes, summaries: Sequence[Summary], places: Sequence[float], colour: str, name: str) -> None:
    dots = [(x, accuracy) for x, s in zip(places, summaries, strict=True) for accuracy in s.accuracies]
    means = [
        (x, s.mean, math.nan if s.deviation is None else s.deviation)
        for x, s in zip(places, summaries, strict=True)
        if s.mean is not None
    ]
    paper = [(x, s.published.accuracy) for x, s in zip(places, summaries, strict=True) if s.published]
    what = f"{name}, " if name else ""
    if dots:
        x, accuracy = zip(*dots, strict=True)
        axes.plot([place - 0.06 for place in x], accuracy, ".", color=colour, alpha=0.4, label=f"{what}one run")
        x, mean, deviation = zip(*means, strict=True)
        axes.errorbar(
            x, mean, deviation, fmt="o", ms=4, capsize=3, color=colour, label=f"{what}mean and standard deviation"
        )
    if paper:
        x, accuracy = zip(*paper, strict=True)
        marker = "x" if colour == "C0" else "+"
        axes.plot([place + 0.06 for place in x], accuracy, marker, color=PAPER, ms=7, label=f"{what}the paper")


def _plot_runs(figure: Figure, results: Results, outcomes: Sequence[Outcome]) -> None:
    panels = 2 if results.table.shows_weights else 1
    axes = figure.subplots(1, panels, squeeze=False)[0]
    (summary,) = results.summaries(outcomes)
    finished = [outcome for outcome in outcomes if outcome.card]
    seeds = [outcome.cell.recipe.seed for outcome in finished]
    axes[0].plot(seeds, summary.accuracies, "o-", ms=4, lw=1, label="one run")
    if summary.mean is not None:
        axes[0].axhline(summary.mean, color="C0", lw=2, alpha=0.5, label=f"mean, {summary.mean:.2f}")
    if summary.published:
        paper = summary.published
        axes[0].axhline(paper.accuracy, color=PAPER, ls="--", label=f"the paper's mean, {paper.accuracy:.2f}")
        spread = math.sqrt(paper.variance or 0)
        axes[0].axhspan(
            paper.accuracy - spread, paper.accuracy + spread, color=PAPER, alpha=0.1, label="its standard deviation"
        )
    axes[0].set(title="accuracy", ylabel="test accuracy, %")
    if panels == 2:
        rows = [learned_weights(outcome.card) for outcome in finished if outcome.card]
        for branch, weights in enumerate(zip(*rows, strict=True)):
            axes[1].plot(seeds, weights, "o-", ms=4, lw=1, color=f"C{branch}", label=f"branch {branch + 1}")
        for branch, weight in enumerate(summary.row.weights if summary.published else ()):
            label = {"label": "the paper's mean"} if branch == 0 else {}
            axes[1].axhline(weight, color=f"C{branch}", ls="--", lw=1, **label)
        axes[1].axhline(0, color="grey", lw=0.8)
        axes[1].set(title="learned weights", ylabel="attention weight")
    for panel in axes:
        panel.set_xlabel("run (seed)")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
        if not finished:
            panel.text(0.5, 0.5, "not run", transform=panel.transAxes, ha="center", color="grey")
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize="small")
