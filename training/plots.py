"""Curves of a run as pictures."""

import warnings
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.text import Text

from training.files import replacing
from training.run import Row


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


def _save(figure: Figure, path: Path) -> None:
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a class may be called "$"
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # or be written in a script that the font has not
        figure.savefig(temporary, dpi=150)
