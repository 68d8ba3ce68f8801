"""Train and compare the paper's tables: `python training/reproduce.py --help`."""

import argparse
import math
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from filelock import FileLock
from tqdm import tqdm

from model.contract import InterflowError
from training import cli
from training.data import NAMED_SETS
from training.files import write_text
from training.grid import Cell, Grid, paper_recipe
from training.loop import choose_device, stop_signals
from training.paper_tables import TABLES, Row
from training.recipe import Recipe, add_recipe_options, resolve_recipe
from training.results import Results
from training.table_plots import plot_table

DECIDED = ("backbone", "init", "freeze", "method", "depth", "taps", "neck", "options", "seed")
"""Settings of a recipe that a table decides."""
JOBS_ON_CUDA = 8
UNFINISHED = 75
"""Exit status where cells are left for the same command to go on with (EX_TEMPFAIL)."""


def main(arguments: list[str] | None = None) -> int:
    """Train the cells of a table that are not there yet, and write the table; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Train one of the paper's tables (Interflow, Sec. IV) and set it beside the paper's figures. It "
        "can be killed at any moment: the same command goes on where it was. Exits with 0 once all cells are there, "
        f"with {UNFINISHED} where some are left, with {cli.INTERRUPTED} after Ctrl-C."
    )
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--seeds", type=cli.count, default=3, help="runs of every row, with the seeds 0, 1, ...")
    parser.add_argument("--methods", nargs="+", metavar="ROW", help="train these rows only; the table shows all")
    parser.add_argument("--jobs", type=cli.count, help=f"runs side by side; 1 on a CPU, {JOBS_ON_CUDA} on CUDA")
    parser.add_argument(
        "--limit-minutes",
        type=float,
        default=math.inf,
        metavar="M",
        help="stop in good order after so long; 0: table only",
    )
    parser.add_argument("--keep-checkpoints", action="store_true", help="of finished runs: 118 MB each at full width")
    parser.add_argument("--runs", type=Path, default=Path("runs/reproduce"), help="where the runs lie")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="where the tables go")
    add_recipe_options(parser)
    settings = vars(parser.parse_args(arguments))
    own = {name: settings.pop(name) for name in list(settings) if name not in Recipe.model_fields}
    if decided := [f"--{name}" for name in settings if name in DECIDED]:
        parser.error(f"{', '.join(decided)}: the table decides that; see --methods and --seeds")
    until = time.monotonic() + 60 * own["limit_minutes"]

    recipe = table_recipe(settings)
    results = Results(own["table"], TABLES[own["table"]], recipe, own["seeds"], own["runs"])
    device = choose_device(recipe.device)
    cells = _cells(results, own["methods"])
    todo = [cell for cell in cells if not cell.done]
    print(f"{results.label}: {len(cells) - len(todo)} of {len(cells)} cells are there")
    write_table(results, own["out"])
    stop: list[int] = []
    if todo and time.monotonic() < until:
        left = len(todo)

        def report(cell: Cell) -> None:
            nonlocal left
            left -= 1
            write_table(results, own["out"])
            tqdm.write(f"[{len(cells) - left}/{len(cells)}] {_running_mean(results, cell)}")

        with stop_signals() as stop:
            jobs = own["jobs"] or (JOBS_ON_CUDA if device.type == "cuda" else 1)
            Grid(
                todo, device, jobs=jobs, stop=stop, until=until,
                keep_checkpoints=own["keep_checkpoints"], report=report,
            ).train()  # fmt: skip
        write_table(results, own["out"])  # with what other processes trained meanwhile
    left = sum(not cell.done for cell in cells)
    print(f"table: {own['out'] / results.stem}.md")
    if not left:
        return 0
    again = shlex.join(["python", "training/reproduce.py", *(sys.argv[1:] if arguments is None else arguments)])
    print(f"{left} of {len(cells)} cells are left; what was begun is saved. Go on with: {again}")
    return cli.INTERRUPTED if any(stop) else UNFINISHED


def table_recipe(settings: dict[str, Any]) -> Recipe:
    """What a table's cells have in common: the paper's recipe, with these settings over it.

    With other epochs the rate drops after the same share of them, unless `drop_epochs` is given.

    Raises:
        InterflowError: not a set that the paper has (or the digits), or as `resolve_recipe`.
    """
    settings = {"data": "cifar10"} | settings
    if settings["data"] not in {"digits", *NAMED_SETS}:
        raise InterflowError(f"--data {settings['data']}: choose one of {', '.join(NAMED_SETS)}, or digits.")
    paper = paper_recipe(settings["data"])
    recipe = resolve_recipe("paper", settings)
    if "drop_epochs" not in settings:
        drop_epochs = round(paper.drop_epochs * recipe.epochs / paper.epochs)
        recipe = resolve_recipe("paper", settings | {"drop_epochs": drop_epochs})
    return recipe


def write_table(results: Results, out: Path) -> None:
    """Write the table as it stands: CSV, Markdown and picture, each whole or not at all."""
    results.runs.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    with FileLock(results.runs / ".tables.lock"):  # so that no one writes what has meanwhile become old
        outcomes = results.outcomes()
        write_text(out / f"{results.stem}.csv", results.to_csv(outcomes))
        write_text(out / f"{results.stem}.md", results.to_markdown(outcomes))
        plot_table(results, outcomes, out / f"{results.stem}.png")


def _cells(results: Results, methods: list[str] | None) -> list[Cell]:
    """In the order of training: seed by seed, so that a grid cut short has as much of every row."""
    rows: tuple[Row, ...] = results.table.rows
    if methods:
        for name in methods:
            if not any(row.is_called(name) for row in rows):
                known = ", ".join(row.name for row in rows)
                raise InterflowError(f"--methods {name}: {results.name} has no such row; choose from {known}.")
        rows = tuple(row for row in rows if any(row.is_called(name) for name in methods))
    return [results.cell(row, seed) for seed in range(results.seeds) for row in rows]


def _running_mean(results: Results, cell: Cell) -> str:
    """What a cell came to, and its row's mean so far."""
    outcomes = results.outcomes()
    mine = next(outcome for outcome in outcomes if outcome.cell.folder == cell.folder)
    row = next(summary for summary in results.summaries(outcomes) if summary.row is mine.row)
    what = f"{row.row.name}, seed {cell.recipe.seed}: " + (
        mine.status if mine.accuracy is None else f"{mine.accuracy:.2f} %"
    )
    if row.mean is None:
        return what
    spread = "" if row.deviation is None else f", standard deviation {row.deviation:.2f}"
    return f"{what} (mean of {len(row.accuracies)}: {row.mean:.2f} %{spread})"


if __name__ == "__main__":
    cli.run(main)
