"""The table and the picture of `benchmarks/explanations.py`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.explanation_metrics import Curves

Row = Mapping[str, Any]


def page(found: Row) -> str:
    """The page in Markdown, from what the JSON file holds."""
    conditions, methods = found["conditions"], found["methods"]
    sizes, measured = conditions["sizes"], {name: row for name, row in methods.items() if "faithfulness" in row}
    parts = [
        "# Are the maps right?\n\n"
        "Written by `python benchmarks/explanations.py`, whose first lines say what is measured, and how.\n\n"
        f"{conditions['model']} (weights {conditions['weights_sha256'][:12]}); test images only, seed "
        f"{conditions['seed']}: {sizes['faithfulness']} for faithfulness, {sizes['mosaics']} mosaics of four, "
        f"{sizes['weights']} for randomised weights, {sizes['shifts']} for shifts. Brackets: 95 % bootstrap intervals "
        f"over images. {conditions['machine']}; "
        f"{', '.join(f'{name} {number}' for name, number in conditions['versions'].items())}.",
        "## Faithful, and on the right place",
        _table(
            (
                "map",
                "SRG",
                "fused evidence ahead by",
                "deletion",
                "insertion",
                "own quadrant",
                "points",
            ),
            [
                (
                    name,
                    _interval(row["faithfulness"]["srg"]),
                    _interval(row["faithfulness"]["ours_ahead"]),
                    f"{row['faithfulness']['deletion'][0]:.3f}",
                    f"{row['faithfulness']['insertion'][0]:.3f}",
                    _interval(row["localisation"]["share"]),
                    _interval(row["localisation"]["pointing"]),
                )
                for name, row in measured.items()
            ],
        ),
        "SRG: insertion less deletion, of which less is better. Own quadrant: share of the positive evidence for a "
        "class that lies in its quadrant of the mosaic (by chance 0.25). Points: how often the highest value does.",
        "## It follows the weights, and stands still where the image moves",
        _table(
            ("map", *next(iter(measured.values()))["weights"], "moved by one pixel"),
            [
                (name, *(f"{step[0]:.2f}" for step in row["weights"].values()), _interval(row["shifts"]["similarity"]))
                for name, row in measured.items()
            ],
        ),
        "Rank correlation (8x8 patches) with the map of the trained network, as parts of it turn random from the top "
        "down, which should fall to 0; and of the maps before and after a move of the image, which should stay at 1 "
        "(coarse maps have it easier).",
        "## Time",
        _table(
            ("in PyTorch, ms of CPU time an image", "alone", "in a batch of 32"),
            [
                (
                    name,
                    *(
                        f"{row['times'][batch]:.2f}" if batch in row["times"] else ""
                        for batch in ("batch 1", "batch 32")
                    ),
                )
                for name, row in methods.items()
                if "times" in row
            ],
        ),
        "The forward pass is part of every other row.",
    ]
    if found["served"]:
        parts += [
            _table(
                ("the exported model in onnxruntime, CPU time", "1 image", "32 images"),
                [
                    (what, *(show(found["served"][batch]) for batch in ("batch 1", "batch 32")))
                    for what, show in _SERVED.items()
                ],
            ),
            f"Maps of all stages, summed, differ from the fused logits by at most {found['served']['residual']:.1e} of "
            f"the largest ({sizes['faithfulness']} images).",
        ]
    parts += ["## Against what was asked", _table(("what", "measured", "to reach", "reached"), aims(found))]
    parts += [
        f"## By layer: SRG on {sizes['layers']} other images, share in the own quadrant, points",
        _table(
            ("layer", *found["layers"]),
            [
                (layer, *(_of_layer(found, cam, layer) for cam in found["layers"]))
                for layer in next(iter(found["layers"].values()))
            ],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _of_layer(found: Row, cam: str, layer: str) -> str:
    place = found["methods"][f"{cam}, {layer}"]["localisation"]
    return f"{found['layers'][cam][layer]:.3f}, {place['share'][0]:.3f}, {place['pointing'][0]:.3f}"


_SERVED: dict[str, Callable[[Row], str]] = {
    "without maps, ms": lambda row: f"{row['without']:.2f}",
    "with the maps of all stages, ms": lambda row: f"{row['with']:.2f}",
    "with them and the fused evidence map drawn from them, ms": lambda row: f"{row['drawn']:.2f}",
    "maps as outputs cost (median of rounds)": lambda row: f"{row['more']:+.1%}",
}


def aims(found: Row) -> list[tuple[str, str, str, str]]:
    """What the maps were to reach, what they did, and whether that is enough."""
    methods, served = found["methods"], found["served"]
    rivals = {name: row for name, row in methods.items() if row["kind"] == "gradient"}
    fused = next(row for row in methods.values() if row["kind"] == "ours")

    def best(part: str, figure: str) -> tuple[str, float]:
        values = ((name, row[part][figure][0]) for name, row in rivals.items() if part in row)
        return max(values, key=lambda pair: pair[1])

    rows = [_aim("SRG of the fused evidence map", fused["faithfulness"]["srg"][0], "at least", 0.3, ".3f")]
    for label, part, figure in (
        ("SRG", "faithfulness", "srg"),
        ("evidence in the own quadrant", "localisation", "share"),
        ("pointing game", "localisation", "pointing"),
    ):
        name, value = best(part, figure)
        rows.append(_aim(f"{label}, against {name}", fused[part][figure][0], "more than", value, ".3f"))
    forward = methods["forward pass"]["times"]
    ours = fused["times"]
    for name in (next(name for name in rivals if name.startswith("Grad-CAM")), "Grad-CAM by hand, one gradient"):
        theirs = methods[name]["times"]
        for batch in forward:
            if served:  # what a map costs beyond the answer, each where it is used
                images = int(batch.removeprefix("batch "))
                beyond = (theirs[batch] - forward[batch]) * images / served[batch]["beyond"]
                rows.append(_aim(f"{name} / ours, beyond the forward pass, {batch}", beyond, "at least", 20, ".1f"))
            rows.append(
                _aim(f"{name} / ours in PyTorch, all told, {batch}", theirs[batch] / ours[batch], "", None, ".1f")
            )
    if served:
        for batch in forward:
            rows.append(
                _aim(f"latency added by the maps as outputs, {batch}", served[batch]["more"], "at most", 0.03, ".1%")
            )
        rows.append(_aim("residual of the sum, of the largest logit", served["residual"], "at most", 1e-4, ".1e"))
    return rows


def _aim(what: str, value: float, direction: str, bound: float | None, form: str) -> tuple[str, str, str, str]:
    if bound is None:
        return what, f"{value:{form}}", "", ""
    held = {"at least": value >= bound, "more than": value > bound, "at most": value <= bound}[direction]
    return what, f"{value:{form}}", f"{direction} {bound:{form}}", "yes" if held else "no"


def _interval(values: Sequence[float]) -> str:
    mean, low, high = values
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


COLOURS = {"ours": "tab:red", "gradient": "tab:blue", "occlusion": "tab:green", "nothing": "tab:gray"}
STYLES = ("-", "--", ":", "-.")


def draw(
    path: Path,
    images: np.ndarray,
    captions: Sequence[str],
    maps: Mapping[str, np.ndarray],
    *,
    curves: Mapping[str, Curves],
    kinds: Mapping[str, str],
) -> None:
    """Maps of all methods side by side, and below them how confidence falls as patches go.

    Args:
        path: of the picture.
        images: uint8 (N, height, width, channels).
        captions: of the images.
        maps: by method, (N, height, width), for the images.
        curves: by method, over other images.
        kinds: of the methods.
    """
    columns, rows = 1 + len(maps), len(images)
    figure = plt.figure(figsize=(1.35 * columns, 1.45 * rows + 4.2), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.45 * rows, 4.2), squeeze=False)[:, 0]
    axes = above.subplots(rows, columns, squeeze=False)
    for row, image, caption in zip(axes, images, captions, strict=True):
        row[0].imshow(image.squeeze(), cmap="gray")
        row[0].set_ylabel(caption, fontsize="small", rotation=0, ha="right", va="center")
    for column, (name, found) in enumerate(maps.items(), start=1):
        axes[0, column].set_title(name.replace(", ", ",\n").replace(" of the ", "\nof the "), fontsize="small")
        for row, values in zip(axes, found, strict=True):
            limit = np.abs(values).max() or 1.0
            row[column].imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])

    panels = below.subplots(1, 3, width_ratios=(3, 3, 2))
    drawn: dict[str, int] = {}
    for name, curve in curves.items():
        kind = kinds[name]
        style = STYLES[drawn.setdefault(kind, 0) % len(STYLES)]
        drawn[kind] += 1
        look = {"color": COLOURS[kind], "ls": style, "lw": 2.5 if name == next(iter(curves)) else 1.2}
        gone = np.linspace(0, 100, curve.most_first.shape[1])
        panels[0].plot(gone, curve.most_first.mean(axis=0), **look)
        panels[1].plot(gone, curve.least_first.mean(axis=0), **look)
        panels[2].plot([], [], label=f"{name}: {curve.srg().mean():.3f}", **look)
    panels[0].set(title="the most relevant patches go first", xlabel="% gone", ylabel="confidence in the answer")
    panels[1].set(title="the least relevant go first", xlabel="% gone")
    panels[2].axis("off")
    panels[2].legend(title="SRG (area between the two)", loc="center left", fontsize="small", frameon=False)
    for panel in panels[:2]:
        panel.set(ylim=(0, 1), xlim=(0, 100))
    figure.savefig(path, dpi=100)
    plt.close(figure)
