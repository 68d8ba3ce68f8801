"""From the cells that are done to a table: one line per cell as CSV, and per row, beside the paper, as Markdown."""

import csv
import io
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from statistics import fmean, stdev, variance
from typing import Any, NamedTuple

from model.contract import ModelCard
from model.methods import METHODS
from training.grid import CONDITIONS, SPEED_ONLY, Cell, departures, paper_recipe
from training.paper_tables import Row, Table
from training.published import Published
from training.recipe import Recipe, load_recipe
from training.run import Run

TEST = (
    "Within the spread: |difference| <= 2 sqrt(s²/n + v/m) where the paper gives the variance v of m runs, else "
    "<= 2 s; s is the standard deviation of our n seeds, itself uncertain where these are few."
)


class Finished(NamedTuple):
    """What a finished cell's folder says."""

    card: ModelCard
    recipe: Recipe
    conditions: dict[str, Any]
    seconds: float
    """Of its epochs, in which other cells had their turns as well."""


class Outcome(NamedTuple):
    """What a cell came to; neither finished nor failed: it was not run."""

    row: Row
    cell: Cell
    finished: Finished | None
    failed: bool

    @property
    def card(self) -> ModelCard | None:
        """Of a finished cell."""
        return None if self.finished is None else self.finished.card

    @property
    def accuracy(self) -> float | None:
        """On test, %."""
        return None if self.card is None else 100 * self.card.metrics.accuracy

    @property
    def status(self) -> str:
        """In words."""
        return "failed" if self.failed else "not run" if self.card is None else "finished"


class Summary(NamedTuple):
    """A row's cells together, accuracies in %.

    Attributes:
        accuracies: of the finished cells, by seed.
        cells: finished, failed and not run.
        failed: how many.
        published: the paper's, where ours may be compared with it.
    """

    row: Row
    accuracies: tuple[float, ...]
    cells: int
    failed: int
    published: Published | None

    @property
    def mean(self) -> float | None:
        """None where no cell is finished."""
        return fmean(self.accuracies) if self.accuracies else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation of a sample; None where fewer than two cells are finished."""
        return stdev(self.accuracies) if len(self.accuracies) > 1 else None

    @property
    def difference(self) -> float | None:
        """Our mean less the paper's figure."""
        return None if self.mean is None or self.published is None else self.mean - self.published.accuracy

    @property
    def verdict(self) -> str:
        """Whether the difference is within the spread, by the rule that `TEST` states; empty without a difference."""
        if self.difference is None or self.published is None:
            return ""
        if self.deviation is None:
            return "one run"
        limit = 2 * self.deviation
        if self.published.variance is not None:
            paper = self.published.variance / self.published.runs
            limit = 2 * math.sqrt(self.deviation**2 / len(self.accuracies) + paper)
        return "yes" if abs(self.difference) <= limit else "no"


class Results(NamedTuple):
    """One table on one data set, with what is there of it.

    Attributes:
        name: as on the command line.
        table: its rows, and the paper's figures.
        recipe: what the cells have in common.
        seeds: asked for, per row; cells of other seeds that are there count as well.
        runs: where the cells lie.
    """

    name: str
    table: Table
    recipe: Recipe
    seeds: int
    runs: Path

    def cell(self, row: Row, seed: int) -> Cell:
        """Of a row and a seed."""
        return Cell.below(self.runs, self.recipe.model_copy(update={**row.settings, "seed": seed}))

    @property
    def stem(self) -> str:
        """Name of its files."""
        return "-".join([self.name, self.recipe.data, *departures(self.recipe)])

    @property
    def label(self) -> str:
        """Data set, and in what it departs from the paper, for people."""
        return ", ".join([self.recipe.data, *(f"{name} {value}" for name, value, _ in self._changed())])

    @property
    def published(self) -> Mapping[str, Published]:
        """The paper's figures by row; none where data or recipe are not the paper's: these do not compare."""
        return {} if self._changed() else self.table.published.get(self.recipe.data, {})

    def outcomes(self) -> list[Outcome]:
        """All cells, row by row and seed by seed."""
        return [_outcome(row, cell) for row in self.table.rows for cell in self._cells(row)]

    def summaries(self, outcomes: Sequence[Outcome]) -> list[Summary]:
        """One per row."""
        return [summarize(row, _of(row, outcomes), self.published.get(row.name)) for row in self.table.rows]

    def to_csv(self, outcomes: Sequence[Outcome]) -> str:
        """One line per cell, with the conditions under which it was trained."""
        lines = [self._line(outcome) for outcome in outcomes]
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        return text.getvalue()

    def to_markdown(self, outcomes: Sequence[Outcome]) -> str:
        """The page: how it came about, the rows beside the paper's, and notes."""
        parts = [
            f"# {self.table.title}, on {self.recipe.data}: test accuracy in %",
            self._setting(),
            _table([self._accuracies(summary, _of(summary.row, outcomes)) for summary in self.summaries(outcomes)]),
        ]
        if self.table.shows_weights:
            learning = [row for row in self.table.rows if METHODS[row.settings["method"]].learned]
            weights = _table([self._weights(row, _of(row, outcomes)) for row in learning])
            parts += ["Learned weights of the branches, shallow to deep, over the seeds:", weights]
        if self.published:
            parts += [TEST, *self.table.notes]
        parts.append(f"![{self.table.title}]({self.stem}.png)")
        return "\n\n".join([*parts, self._conditions(outcomes)]) + "\n"

    def _cells(self, row: Row) -> list[Cell]:
        asked = [self.cell(row, seed) for seed in range(self.seeds)]
        stem = self.cell(row, 0).folder.name.removesuffix("0")
        there = [
            path.parent.name.removeprefix(stem) for path in self.cell(row, 0).folder.parent.glob(f"{stem}*/card.json")
        ]
        more = sorted(int(seed) for seed in there if seed.isdecimal() and int(seed) >= self.seeds)
        return asked + [self.cell(row, seed) for seed in more]

    def _setting(self) -> str:
        how = f"`{self.command}`\n\n"
        if not self._changed():
            return how + (
                f"The paper's recipe: {self.recipe.epochs} epochs, full width. A branch's accuracy is its reading's."
            )
        changed = ", ".join(f"{name} {value} instead of {paper}" for name, value, paper in self._changed())
        return how + (
            f"**Not the paper's setting**: {changed}. These figures do not compare with the paper's. A branch's "
            "accuracy is its reading's."
        )

    def _changed(self) -> list[tuple[str, Any, Any]]:
        """Settings that are not the paper's: name, value, the paper's value."""
        paper = paper_recipe(self.recipe.data)
        names = [name for name, value in paper if name not in SPEED_ONLY and value != getattr(self.recipe, name)]
        return [(name, getattr(self.recipe, name), getattr(paper, name)) for name in names]

    @property
    def command(self) -> str:
        """Fills the table."""
        paper = paper_recipe(self.recipe.data)
        options = ["--data", self.recipe.data, "--seeds", str(self.seeds), *_options(self.recipe, paper)]
        return " ".join(["python training/reproduce.py", self.name, *options])

    def _line(self, outcome: Outcome) -> dict[str, Any]:
        card, recipe = outcome.card, outcome.cell.recipe
        conditions = {} if outcome.finished is None else outcome.finished.conditions
        paper = paper_recipe(recipe.data)
        provenance = None if card is None else card.provenance
        versions = provenance.versions if provenance else {}
        return {
            "table": self.name,
            "row": outcome.row.name,
            "seed": recipe.seed,
            "status": outcome.status,
            "accuracy": "" if outcome.accuracy is None else f"{outcome.accuracy:.4f}",
            "branch_accuracy": "" if card is None else _numbers([100 * a for a in card.metrics.branch_accuracy], 2),
            "weights": "" if card is None or not self.table.shows_weights else _numbers(learned_weights(card), 4),
            "backbone": recipe.backbone,
            "method": recipe.method,
            "epochs": recipe.epochs,
            "width": recipe.width,
            "seconds": "" if outcome.finished is None else f"{outcome.finished.seconds:.1f}",
            "jobs": conditions.get("jobs", ""),
            "hardware": conditions.get("hardware", ""),
            "torch": versions.get("torch", ""),
            "python": versions.get("python", ""),
            "revision": (provenance and provenance.git_revision) or "",
            "command": " ".join(
                ["python training/train.py --recipe paper --data", recipe.data, *_options(recipe, paper)]
            ),
        }

    def _weights(self, row: Row, outcomes: Sequence[Outcome]) -> dict[str, str]:
        """A line of the table of weights, by column."""
        learned = [learned_weights(outcome.card) for outcome in outcomes if outcome.card]
        line = {
            self.table.axis: row.name,
            "mean": _means(learned, 4),
            "mean size": _means([list(map(abs, weights)) for weights in learned], 4),
            "variance": _numbers(map(variance, zip(*learned, strict=True)), 4) if len(learned) > 1 else "",
        }
        return line | ({"the paper's": _numbers(row.weights, 4)} if self.published else {})

    def _accuracies(self, summary: Summary, outcomes: Sequence[Outcome]) -> dict[str, str]:
        """A line of the table of accuracies, by column."""
        cards = [outcome.card for outcome in outcomes if outcome.card]
        n = len(summary.accuracies)
        seeds = f"{n}" if n == summary.cells else f"{n} of {summary.cells}"
        line = {
            self.table.axis: summary.row.name,
            "mean": "not run" if not n and not summary.failed else _number(summary.mean),
            "standard deviation": _number(summary.deviation),
            "seeds": seeds + (f", {summary.failed} failed" if summary.failed else ""),
        }
        if self.published:
            paper = summary.published
            line |= {"paper": "", "difference": "", "within the spread": summary.verdict}
            if paper is not None:
                line["paper"] = f"{paper.accuracy:.2f}" + (f" (mean of {paper.runs})" if paper.runs > 1 else "")
                line["paper"] += f", published cell {paper.cell:.2f}" if paper.cell else ""
            if summary.difference is not None:
                line["difference"] = f"{summary.difference:+.2f}"
        line["branches, shallow to deep"] = _means([[100 * a for a in c.metrics.branch_accuracy] for c in cards], 2)
        return line

    def _conditions(self, outcomes: Sequence[Outcome]) -> str:
        lines = [self._line(outcome) for outcome in outcomes if outcome.card]
        if not lines:
            return "No cell is finished yet."
        values = {name: sorted({str(line[name]) for line in lines if line[name]}) for name in lines[0]}
        return (
            f"Trained on {'; '.join(values['hardware']) or 'hardware unknown'}, torch {', '.join(values['torch'])}, "
            f"python {', '.join(values['python'])}, revision {', '.join(values['revision']) or 'unknown'}. Every cell "
            f"with its seconds and its own command: [{self.stem}.csv]({self.stem}.csv)."
        )


def summarize(row: Row, outcomes: Sequence[Outcome], published: Published | None) -> Summary:
    """One row's cells together."""
    accuracies = tuple(outcome.accuracy for outcome in outcomes if outcome.accuracy is not None)
    return Summary(row, accuracies, len(outcomes), sum(outcome.failed for outcome in outcomes), published)


def _of(row: Row, outcomes: Sequence[Outcome]) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.row is row]


def _table(lines: Sequence[dict[str, str]]) -> str:
    """In Markdown; the first line's keys are the header."""
    rows = [list(lines[0]), ["---"] * len(lines[0]), *(list(line.values()) for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _outcome(row: Row, cell: Cell) -> Outcome:
    if not cell.run.card.is_file():
        return Outcome(row, cell, None, failed=cell.failure.is_file())
    finished = _read(cell.folder, cell.run.card.stat().st_mtime_ns)
    cell.require_same(finished.recipe)
    return Outcome(row, cell, finished, failed=False)


@lru_cache(maxsize=10_000)
def _read(folder: Path, _changed: int) -> Finished:
    """Read a cell once: a table is written after every one of hundreds."""
    run, conditions = Run(folder), {}
    if (folder / CONDITIONS).is_file():
        conditions = json.loads((folder / CONDITIONS).read_text(encoding="utf-8"))
    images = conditions.get("train_images", math.nan)
    rates = [row["images_per_second"] for row in run.history()]
    # stopped after the last step of an epoch, a run went on with no image of it left to train on
    seconds = sum(images / rate for rate in rates if rate > 0)
    return Finished(run.finished_card(), load_recipe(run.recipe), conditions, seconds)


def learned_weights(card: ModelCard) -> list[float]:
    """Attention weights, shallow to deep: one a branch, or all classes' of each branch after one another."""
    per_class = card.method.attention == "class"
    return [weight for row in card.branch_weights for weight in (row if per_class else row[:1])]


def _options(recipe: Recipe, paper: Recipe) -> list[str]:
    """As on the command line, all that differs from the paper's recipe but does not only change its speed."""
    options: list[str] = []
    for name, value in recipe:
        if name in SPEED_ONLY or value == getattr(paper, name):
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            options.append(f"--{'' if value else 'no-'}{flag}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            options += [f"--{flag}", *(shlex.quote(str(v)) for v in values)]
    return options


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _numbers(values: Any, digits: int) -> str:
    return " ".join(f"{value:.{digits}f}" for value in values)


def _means(rows: Sequence[Sequence[float]], digits: int) -> str:
    return _numbers(map(fmean, zip(*rows, strict=True)), digits) if rows else ""
