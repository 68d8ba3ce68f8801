"""The table and the picture of `benchmarks/calibration.py`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

Row = Mapping[str, Any]
FIGURES = (("ece", "ECE, %"), ("ece_adaptive", "adaptive ECE, %"), ("nll", "NLL"))


def page(found: Row) -> str:
    """The page in Markdown, from what the JSON file holds."""
    conditions, fused, doubt = found["conditions"], found["fused"], found["doubt"]
    images = ", ".join(f"{name} {count:,}" for name, count in conditions["images"].items())
    parts = [
        "# Is a confidence a probability, and what is worth doubting?\n\n"
        "Written by `python benchmarks/calibration.py`, whose first lines say what is measured, and how.\n\n"
        f"{conditions['model']} (weights {conditions['weights_sha256'][:12]}, trained with label smoothing "
        f"{conditions['label_smoothing']:g}), test accuracy {conditions['accuracy']:.2%}. Images: {images}.",
        "## Before and after the fit, on test",
        _table(
            ("", *(f"{title}, {when}" for _, title in FIGURES for when in ("before", "after"))),
            [
                ("fused answer", *_pairs(fused)),
                *((f"reading of {row['name']} ({row['accuracy']:.1%} right)", *_pairs(row)) for row in found["stages"]),
            ],
        ),
        "Before: the softmax of the fused logits, and of a stage's contributions. After: as it is served, all fitted "
        "on the held-out images. ECE in 15 bins of equal width, or (adaptive) of equally many images. The fused "
        f"confidence has the temperature {fused['temperature']:.3f} and the power {fused['power']:.2f}. Calibrated "
        f"confidences would have an ECE of {fused['ece_by_chance']:.2%} here, by chance.",
        "## Fits that were tried for the fused confidence",
        _table(
            ("", "NLL, held out, by cross-validation", *(f"{title}, test" for _, title in FIGURES)),
            [(row["name"], f"{row['held_out_nll']:.4f}", *_figures(row["test"])) for row in found["fits"]],
        ),
        "None changes the ranking of an image's classes. With a power, a class that lies g below the highest logit "
        "gets exp(-(g / temperature) ** power), over the sum of all; power 1 is the plain temperature. A power for "
        "each reading, too, was tried:",
        _table(
            ("reading of", *(f"{title}, {how}" for _, title in FIGURES for how in ("as served", "with a power"))),
            [(row["name"], *_pairs(row, "after", "with_power")) for row in found["stages"]],
        ),
        "## What finds wrong answers, and foreign images",
        _table(
            ("AUROC", *next(iter(doubt["measures"].values()))),
            [
                (name, *("" if area is None else f"{area:.4f}" for area in row.values()))
                for name, row in doubt["measures"].items()
            ],
        ),
        "Wrong: wrong answers among right ones. The other columns: images of that set, none of whose classes is the "
        "network's, among test images. 1 - confidence is the maximum softmax probability, turned round. Distance: "
        "Mahalanobis, in the evidence of all stages and classes, from the answer's class. Five features: confidence, "
        "lead, entropy, support, disagreement. The measures other than doubt and the five features know no labels of "
        "wrong answers; foreign images entered no fit, but the indecision was chosen among the measures after its "
        "AUROC for them was seen, on the network whose weights begin with 44e0b0a1daed.",
    ]
    if doubt["fitted"]:
        fitted, figures = doubt["fitted"], doubt["figures"]
        beyond = [f"{share:.1%} of {name}" for name, share in doubt["beyond_threshold"].items() if name != "held out"]
        ahead = [
            f"{'wrong answers' if name == 'test' else name} {mean:+.4f} ({low:+.4f} to {high:+.4f})"
            for name, (mean, low, high) in doubt["ahead"].items()
        ]
        bias, of_confidence, of_stages = fitted["coefficients"]
        parts += [
            "## Doubt",
            f"Probability that the answer is wrong: log-odds {bias:.2f} + {of_confidence:.2f} log(1 - confidence) + "
            f"{of_stages:.2f} log(indecision of the stages). On test its mean is {figures['mean']:.2%}, and "
            f"{figures['wrong']:.2%} of the answers are wrong; ECE {figures['ece']:.2%}, adaptive "
            f"{figures['ece_adaptive']:.2%}.",
            f"Ahead of 1 - confidence in AUROC, with 95 % intervals over images: {'; '.join(ahead)}.",
            f"The threshold is {fitted['threshold']:.3f}: of test, {fitted['share']:.1%} of the answers have more "
            f"doubt, and these hold {fitted['share_of_wrong']:.1%} of the wrong ones. Beyond it: {', '.join(beyond)}.",
        ]
    else:
        parts.append("Hardly a held-out answer is wrong: no doubt was fitted.")
    return "\n\n".join(parts) + "\n"


def _figures(row: Row) -> list[str]:
    return [f"{row[key]:.4f}" if key == "nll" else f"{100 * row[key]:.2f}" for key, _ in FIGURES]


def _pairs(row: Row, first: str = "before", second: str = "after") -> list[str]:
    return [text for pair in zip(_figures(row[first]), _figures(row[second]), strict=True) for text in pair]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(found: Row, scores: Mapping[str, Mapping[str, np.ndarray]], path: Path) -> None:
    """Reliability of the fused answer and of the readings, before and after; and what doubt finds.

    Args:
        found: what the JSON file holds.
        scores: measures of doubt by set of images, the test images with "wrong answers" among these.
        path: of the PNG.
    """
    stages = found["stages"]
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.3), layout="constrained")
    colours = plt.colormaps["viridis"](np.linspace(0.05, 0.85, max(2, len(stages))))
    for axis in axes[:2]:
        axis.plot((0, 1), (0, 1), ":", color="grey")
        axis.set(xlabel="confidence", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1))
    fused = found["fused"]
    _reliability(axes[0], fused["reliability"]["before"], f"before: ECE {fused['before']['ece']:.1%}", "tab:red", "--")
    _reliability(axes[0], fused["reliability"]["temperature"], "with a temperature only", "tab:orange", "--")
    _reliability(axes[0], fused["reliability"]["after"], f"after: ECE {fused['after']['ece']:.1%}", "tab:blue")
    axes[0].set_title("fused answer")
    for row, colour in zip(stages, colours, strict=False):
        _reliability(axes[1], row["reliability"]["before"], None, colour, "--")
        label = f"{row['name']}: ECE {row['before']['ece']:.0%}, after {row['after']['ece']:.1%}"
        _reliability(axes[1], row["reliability"]["after"], label, colour)
    axes[1].set_title("readings (dashed: before)")
    best = "doubt" if "doubt" in scores else "1 - confidence"
    names = [name for name in scores["1 - confidence"] if name not in ("held out", "test")]
    for name, colour in zip(names, plt.colormaps["tab10"](range(10)), strict=False):
        for measure, style in (("1 - confidence", "--"), ("doubt", "-")):
            if measure in scores and len(scores[measure][name]):
                own, sought = scores[measure]["test"], scores[measure][name]
                shares = np.linspace(0, 1, 201)
                found_there = (sought[:, np.newaxis] > np.quantile(own, 1 - shares)).mean(axis=0)
                axes[2].plot(shares, found_there, style, color=colour, label=name if measure == best else None)
    axes[2].set(
        xlabel="share of the test images with as much doubt", ylabel="share found", xlim=(0, 0.5), ylim=(0, 1),
        title="found by doubt (dashed: 1 - confidence)",
    )  # fmt: skip
    for axis in axes:
        axis.legend(fontsize="small", frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _reliability(axis: Any, bins: Sequence[Row], label: str | None, colour: Any, style: str = "-") -> None:
    """A point for each bin of equally many images."""
    axis.plot(
        [row["confidence"] for row in bins], [row["accuracy"] for row in bins],
        style, marker="o", markersize=3, color=colour, label=label,
    )  # fmt: skip
