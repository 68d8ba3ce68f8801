"""The page and the picture of `benchmarks/adaptive.py`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

FULL = "full"
AIMS = {1: 1.8, 32: 1.5}
"""By images in a batch: times the images per second of full depth that were asked for, in float32."""
MOST_LOST = 0.1
"""Points of accuracy on test that this may cost."""
AIM_SERVED = 1.0
"""Of bare onnxruntime's images per second at full depth in float32, over HTTP in int8."""

Row = Mapping[str, Any]


def page(found: Row) -> str:
    """In Markdown, from what the JSON file holds."""
    conditions = found["conditions"]
    parts = [
        "# Stopping early\n\nWritten by `python benchmarks/adaptive.py`, whose first lines say what is measured, and "
        f"how.\n\n{conditions['date']}; {conditions['machine']}; onnxruntime {conditions['versions']['onnxruntime']}; "
        f"{conditions['images']} test images of {conditions['data']}; the networks by themselves on "
        f"{conditions['threads']} thread(s), {conditions['rounds']} rounds."
    ]
    for name, model in found["models"].items():
        full, stages = model["answers"][FULL], ", ".join(model["stages"])
        rows = []
        for mode, row in model["answers"].items():
            stops = ", ".join(f"{share:.1%}" for share in row.get("stops", ()))
            rows.append(
                (
                    "full depth" if mode == FULL else f"{float(mode):.2%}",
                    f"{row['accuracy']:.2%}",
                    "" if mode == FULL else f"{100 * (full['accuracy'] - row['accuracy']):+.2f}",
                    stops,
                    f"{row.get('work', 1):.2f}",
                    *(_rate(row[f"batch {batch}"]) for batch in AIMS),
                )
            )
        of_stages = ", ".join(f"{value:.2%}" for value in full["branch_accuracy"])
        most = max(row.get("whole_differs_by", 0) for row in model["answers"].values())
        parts.append(
            f"## {name} ({model['precision']})\n\nReadings of {stages} by themselves: {of_stages}. Where all stages "
            f"ran, the logits differ from those of the whole graph by at most {most:.1e} of their scale.\n\n"
            + _table(
                (
                    "promised loss, at most",
                    "accuracy",
                    "points lost",
                    f"answered by {stages}",
                    "work",
                    *(f"images/s, batch {batch}" for batch in AIMS),
                ),
                rows,
            )
        )
    if "served" in found:
        served = found["served"]
        rows = [
            (
                "bare onnxruntime, no HTTP, full depth" if name == "bare" else name.replace(" full", ", full depth"),
                f"{rate:,.0f}",
                f"{served['of_bare'][name]:.2f}",
                f"{served['p99_ms'][name]:.0f}" if name in served["p99_ms"] else "",
            )
            for name, rate in served["per_second"].items()
        ]
        parts.append(
            f"## Served\n\nwrk, one thread, {served['connections']} connections, forms with JPEGs of test images, on "
            f"the same CPUs; {served['errors']} errors. After a model's name the promised loss. One lane: "
            "`INTERFLOW_LANES=1 INTERFLOW_THREADS=1`.\n\n" + _table(("", "per second", "of bare", "p99 ms"), rows)
        )
    parts.insert(1, _table(("what was asked", "measured", "to reach", "reached"), _verdicts(found)))
    return "\n\n".join(parts) + "\n"


def _verdicts(found: Row) -> list[tuple[str, ...]]:
    """What was asked, of the strictest promise, and of the most generous one that kept within `MOST_LOST` on test."""
    rows: list[tuple[str, ...]] = []
    for name, model in found["models"].items():
        if model["precision"] != "float32":
            continue
        full, *promises = model["answers"].items()
        kept = [
            (mode, row) for mode, row in promises if 100 * (full[1]["accuracy"] - row["accuracy"]) <= MOST_LOST + 1e-9
        ]
        for batch, aim in AIMS.items():
            for mode, row in dict([promises[0], *kept[-1:]]).items():
                times = row[f"batch {batch}"]["times_full"]
                what = f"{name}, batch {batch}, promise {float(mode):.2%}: times full depth"
                rows.append((what, f"{times:.2f}", f"{aim:g}", "yes" if times >= aim else "no"))
    if "served" in found:
        of_bare = found["served"]["of_bare"]
        served = {name: share for name, share in of_bare.items() if "int8" in name and "full" not in name}
        if served:
            best = max(served, key=lambda name: served[name])
            reached = "yes" if served[best] >= AIM_SERVED else "no"
            rows.append((f"{best}, over HTTP: of bare onnxruntime", f"{served[best]:.2f}", f"{AIM_SERVED:g}", reached))
    return rows


def _rate(row: Row) -> str:
    return f"{row['images_per_second']:,.0f} ({row['times_full']:.2f} x)"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(found: Row, path: Path) -> None:
    """Accuracy against the speed of the network, for each model and batch; a point a promise."""
    figure, axes = plt.subplots(1, len(AIMS), figsize=(10, 4.2), sharey=True, constrained_layout=True)
    for axis, batch in zip(axes, AIMS, strict=True):
        for (name, model), colour in zip(
            found["models"].items(), ("#1f5fa8", "#c4571b", "#2f7d4f", "#6d4a9c"), strict=False
        ):
            rates, accuracies = (
                [value(row) for row in model["answers"].values()]
                for value in (
                    lambda row: row[f"batch {batch}"]["images_per_second"],  # noqa: B023 - called at once
                    lambda row: 100 * row["accuracy"],
                )
            )
            axis.plot(rates, accuracies, color=colour, linewidth=1.2, marker="o", markersize=5, label=name)
            axis.plot(rates[0], accuracies[0], color=colour, marker="o", markersize=10, fillstyle="none")
            axis.axhline(accuracies[0], color=colour, linewidth=0.6, linestyle=":")
        axis.set_xlabel(f"images per second, batches of {batch}")
        axis.set_xlim(left=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("accuracy on test, %")
    axes[0].legend(frameon=False, loc="lower left")
    figure.suptitle("Stopping early: ringed full depth, then the promises of the card, from the strictest", fontsize=11)
    figure.savefig(path, dpi=130, format="png")
    plt.close(figure)
