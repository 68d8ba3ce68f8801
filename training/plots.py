"""A run as pictures: its curves, and which classes it takes for which."""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rcParams
from matplotlib.colors import Colormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.text import Text

from training.files import replacing
from training.run import Row

CLASSES_COUNTED = 30
"""Up to so many classes the cells of a confusion matrix hold their counts."""
CLASSES_NAMED = 120
"""Up to so many every class is named beside it."""
LONGEST_NAME = 24
"""Of a class, in letters; the picture is of the matrix."""


def plot_accuracy(rows: list[Row], path: Path) -> None:
    """Fused and per-stage accuracy over the epochs, on held-out images where there are any."""
    part = "val_accuracy" if "val_accuracy" in rows[0] else "train_accuracy"
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    epochs = [row["epoch"] for row in rows]
    for column in [name for name in rows[0] if name.startswith(f"{part}/")]:
        axes.plot(epochs, [100 * row[column] for row in rows], lw=1, label=column.partition("/")[2])
    axes.plot(epochs, [100 * row[part] for row in rows], lw=2.2, color="black", label="fused")
    axes.set(xlabel="epoch", ylabel=f"accuracy, % ({'held out' if part == 'val_accuracy' else 'train'})")
    axes.grid(alpha=0.3)
    axes.legend(title="stage")
    _save(figure, path)


def plot_weights(rows: list[Row], path: Path) -> None:
    """Attention weights over the epochs (the paper's Fig. 4b as a curve), a panel per stage for S3, S4, S8 and S9."""
    columns = [name for name in rows[0] if name.startswith("weight/")]
    stages = list(dict.fromkeys(name.split("/")[1] for name in columns))
    epochs = [row["epoch"] for row in rows]
    per_class = any(name.count("/") > 1 for name in columns)
    panels = len(stages) if per_class else 1
    figure = Figure(figsize=(max(6.0, 3.2 * panels), 3.8), layout="constrained")
    grid = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    for i, stage in enumerate(stages):
        axes = grid[i if per_class else 0]
        mine = [name for name in columns if name.split("/")[1] == stage]
        for name in mine:
            axes.plot(epochs, [row[name] for row in rows], lw=1, label=name.partition("/")[2].split("/", 1)[-1])
        if per_class:
            mean = [sum(row[name] for name in mine) / len(mine) for row in rows]
            axes.plot(epochs, mean, color="black", lw=2, label="mean")
            axes.set_title(stage)
    for axes in grid:
        axes.axhline(0, color="grey", lw=0.8)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    grid[0].set_ylabel("attention weight")
    if len(grid[-1].lines) <= 14:  # a legend of a hundred classes would hide the curves
        grid[-1].legend(
            title="class" if per_class else "stage", fontsize="small", bbox_to_anchor=(1, 1), loc="upper left"
        )
    _save(figure, path)


def plot_confusion(counts: np.ndarray, classes: Sequence[str], path: Path) -> None:
    """Save `confusion_figure` as a picture."""
    _save(confusion_figure(counts, classes), path)


def confusion_figure(counts: np.ndarray, classes: Sequence[str], colours: str | Colormap = "Blues") -> Figure:
    """Confusion matrix, a row per true class with its recall, coloured by the share of the row.

    Args:
        counts: (K, K) images by true class and answer; every class has some.
        classes: (K,) labels.
        colours: from none of a class's images to all of them.
    """
    count = len(classes)
    images = counts.sum(axis=1, keepdims=True)
    shares = 100 * counts / images
    side = float(np.clip(0.4 * count, 2.4, 15))
    figure = Figure(figsize=(side + 3.4, side + 1.8), layout="constrained")
    axes = figure.subplots()
    # the square root of shares: a few mistakes among many images would be white
    picture = axes.imshow(shares, cmap=colours, norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
    if count <= CLASSES_COUNTED:
        for true, answer in zip(*counts.nonzero(), strict=True):
            ink = "white" if shares[true, answer] > 40 else rcParams["text.color"]
            axes.text(answer, true, f"{counts[true, answer]}", color=ink, ha="center", va="center", fontsize="small")
    every = math.ceil(count / CLASSES_NAMED)
    ticks = np.arange(0, count, every)
    size = float(np.clip(72 * side / len(ticks), 5, 9))  # points that fit a row
    names = [name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…" for name in classes[::every]]
    axes.set_xticks(ticks, names, rotation=90, fontsize=size)
    axes.set_yticks(ticks, names, fontsize=size)
    axes.set(xlabel="answer", ylabel="class")
    right = axes.secondary_yaxis("right")
    right.set_yticks(ticks, [f"{shares[i, i]:.0f} % of {images[i, 0]}" for i in ticks], fontsize=size)
    right.set_ylabel("recall")
    figure.colorbar(picture, ax=axes, label="of the class's images, %", shrink=min(1.0, 5 / side))
    return figure


def _save(figure: Figure, path: Path) -> None:
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a class may be called "$"
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # or be written in a script that the font has not
        figure.savefig(temporary, dpi=150)
