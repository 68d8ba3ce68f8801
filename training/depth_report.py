"""What every depth of a network costs and answers: as a table, a sentence of advice and a picture."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from training.files import replacing, write_text
from training.shorten import name_of_cut, within


@dataclass(frozen=True)
class Row:
    """One network: a run's, cut behind one of its stages; the last one's is the whole.

    Attributes:
        stage: the last one kept.
        fine_tuned: epochs that it was trained further; 0: not at all.
        run: folder that it is exported from.
        held_out, test: fused accuracies, fractions.
        parameters: how many.
        onnx_bytes: of the model file.
        multiply_adds: of one image.
        latency_ms: of one image in onnxruntime, median.
        images_per_second: in batches of 32, median.
    """

    stage: str
    fine_tuned: int
    run: str
    held_out: float
    test: float
    parameters: int
    onnx_bytes: int
    multiply_adds: int
    latency_ms: float
    images_per_second: float


@dataclass(frozen=True)
class DepthTable:
    """All cuts of one run.

    Attributes:
        run: folder of the whole network's.
        model: name in its card.
        weights_sha256: of the whole network.
        fitted_on: what the held-out images are.
        test_images: how many.
        conditions: of the timings.
        tolerance: points of held-out accuracy that may be lost.
        rows: from shallow to deep, the whole network last; a fine-tuned network behind the one it began as.
    """

    run: str
    model: str
    weights_sha256: str
    fitted_on: str
    test_images: int
    conditions: str
    tolerance: float
    rows: Sequence[Row]

    @property
    def whole(self) -> Row:
        """The network that was trained."""
        return self.rows[-1]

    def advice(self) -> str:
        """The shortest network within the tolerance by held-out accuracy, in a sentence, and how to export it."""
        whole = self.whole
        shorter = self.rows[:-1]
        best = next((row for row in shorter if within(row.held_out, whole.held_out, self.tolerance)), None)
        if best is None:
            nearest = max(shorter, key=lambda row: row.held_out)
            return (
                f"Keep the whole network: no shorter one is within {self.tolerance:g} points of its "
                f"{whole.held_out:.2%} on held-out images; {_called(nearest)}, the nearest, has {nearest.held_out:.2%}."
            )
        depth = "" if best.fine_tuned else f" --depth {shlex.quote(best.stage)}"
        name = f" --name {name_of_cut(self.model, best.stage)}" if best.fine_tuned else ""
        shares = (
            f"{best.multiply_adds / whole.multiply_adds:.0%} of the multiply-adds",
            f"{best.parameters / whole.parameters:.0%} of the parameters",
            f"{best.latency_ms / whole.latency_ms:.0%} of the latency",
        )
        return (
            f"Cut it behind {_called(best)}: the shortest network within {self.tolerance:g} points of the whole one's "
            f"{whole.held_out:.2%} on held-out images has {best.held_out:.2%}, with {', '.join(shares)}: "
            f"`python training/export.py --run {shlex.quote(best.run)}{depth}{name}`."
        )

    def to_markdown(self) -> str:
        """The table, with columns of equal width, so that it reads well on a terminal too."""
        whole = self.whole
        lines = [(
            "cut behind", "held out, %", "test, %", "points lost on test", "parameters", "ONNX, MB", "multiply-adds, M",
            "1 image, ms", "images/s in 32s",
        )]  # fmt: skip
        lines += [
            (
                _called(row) + (" (whole)" if row is whole else ""),
                f"{100 * row.held_out:.2f}",
                f"{100 * row.test:.2f}",
                f"{100 * (whole.test - row.test):.2f}",
                f"{row.parameters:,}",
                f"{row.onnx_bytes / 1e6:.2f}",
                f"{row.multiply_adds / 1e6:,.1f}",
                f"{row.latency_ms:.2f}",
                f"{row.images_per_second:,.0f}",
            )
            for row in self.rows
        ]
        wide = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = []
        for first, *others in lines:
            cells = (cell.rjust(width) for cell, width in zip(others, wide[1:], strict=True))
            padded.append(" | ".join(["| " + first.ljust(wide[0]), *cells]) + " |")
        rule = "|".join(["", " " + "-" * wide[0] + " ", *(" " + "-" * (w - 1) + ": " for w in wide[1:]), ""])
        return "\n".join([padded[0], rule, *padded[1:]])

    def command(self) -> str:
        """What makes this table anew."""
        words = ["python", "training/depth.py", "--run", self.run, "--tolerance", f"{self.tolerance:g}"]
        if fine_tuned := [row for row in self.rows if row.fine_tuned]:
            words += ["--fine-tune", str(fine_tuned[0].fine_tuned), "--stages", *(row.stage for row in fine_tuned)]
        return shlex.join(words)

    def page(self, picture: str) -> str:
        """The whole page, in Markdown, with the picture of that name."""
        return (
            f"# How deep {Path(self.run).name} has to be\n\n"
            f"Written by `{self.command()}` (weights {self.weights_sha256[:12]}).\n\n"
            f"{self.advice()}\n\n{self.to_markdown()}\n\n![Accuracy against latency and parameters]({picture})\n\n"
            f"Held out: {self.fitted_on}; depths are chosen by it. Test: {self.test_images:,} images, measured only. "
            f"Times: {self.conditions}.\n"
        )

    def to_json(self) -> str:
        """All figures, and the advice."""
        fields: dict[str, Any] = asdict(self)
        return json.dumps(fields | {"advice": self.advice()}, indent=2) + "\n"


def write_table(table: DepthTable, folder: Path) -> Path:
    """Write depth-<run>.md, .json and .png into a folder; returns the first."""
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / f"depth-{Path(table.run).name}.md"
    plot(table, page.with_suffix(".png"))
    write_text(page.with_suffix(".json"), table.to_json())
    write_text(page, table.page(page.with_suffix(".png").name))
    return page


def plot(table: DepthTable, path: Path) -> None:
    """Test accuracy against latency and against parameters, a point per network."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _draw(left, table, [row.latency_ms for row in table.rows])
    _draw(right, table, [row.parameters / 1e6 for row in table.rows])
    left.set(xlabel="latency of one image, ms", ylabel="test accuracy, %")
    right.set(xlabel="parameters, millions")
    left.legend(loc="lower right")
    figure.suptitle(f"{Path(table.run).name}, cut behind each stage", fontsize="medium")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130)


def _draw(axes: Axes, table: DepthTable, costs: Sequence[float]) -> None:
    for fine_tuned, colour, marker, label in ((False, "C0", "o", "cut"), (True, "C1", "^", "cut and fine-tuned")):
        found = zip(costs, table.rows, strict=True)
        mine = [(x, 100 * row.test, row) for x, row in found if bool(row.fine_tuned) == fine_tuned]
        if mine:
            axes.plot([x for x, _, _ in mine], [y for _, y, _ in mine], marker, ls="-", lw=1, color=colour, label=label)
        for x, y, row in mine:
            side, place = ("right", (-7, 6)) if fine_tuned else ("left", (6, -12))
            if row is table.whole:
                side, place = "center", (0, 8)
            text = f"{row.stage} {y:.2f}"
            axes.annotate(
                text, (x, y), xytext=place, textcoords="offset points", ha=side, fontsize="small", color=colour
            )
    axes.axhline(100 * table.whole.test, color="grey", lw=0.8, ls="--")
    axes.margins(x=0.14, y=0.12)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)


def _called(row: Row) -> str:
    epochs = f"{row.fine_tuned} epoch{'s' if row.fine_tuned > 1 else ''}"
    return f"{row.stage}, fine-tuned for {epochs}" if row.fine_tuned else row.stage
