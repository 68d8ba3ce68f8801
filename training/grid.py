"""Many runs of one data set, side by side on one device: each an ordinary run's folder, and none trained twice."""

import json
import platform
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from model.contract import InterflowError
from model.interflow import Interflow
from training.data import ImageData, load_data
from training.files import write_text
from training.finish import finish
from training.loop import NotFiniteError, StoppedError, Training, steps_per_epoch
from training.recipe import Recipe, load_recipe, resolve_recipe
from training.run import BusyError, Run
from training.train import build_network

SPEED_ONLY = frozenset({"data_dir", "workers", "cache", "device", "cuda_graph", "channels_last", "compile"})
"""Settings that decide where and how fast a run is trained, and its figures only to rounding."""

CONDITIONS = "conditions.json"
"""In a cell's folder: what its card does not say (hardware, cells side by side, training images)."""

TIME_IS_UP = 0
"""Among the signals to stop: none, but the end of the time that was given."""
WAIT_S = 0.002
"""Between two looks at cells that are all being finished."""

LOG_EVERY_S = 30
"""Progress, where no one looks on."""

End = Literal["trained", "failed", "stopped", "busy"]


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of a grid, in a folder named after what sets it apart from the paper's recipe."""

    folder: Path
    recipe: Recipe

    @classmethod
    def below(cls, runs: Path, recipe: Recipe) -> "Cell":
        """The cell of this recipe: runs/<data>/[<backbone>-]<method>[-<setting><value>...]-seed<n>."""
        name = ("" if recipe.backbone == "vgg16" else f"{recipe.backbone}-") + recipe.method
        return cls(runs / recipe.data / "-".join([name, *departures(recipe), f"seed{recipe.seed}"]), recipe)

    @property
    def run(self) -> Run:
        """Its folder's files."""
        return Run(self.folder)

    @property
    def failure(self) -> Path:
        """Says why the network could not be trained: its loss became infinite, which is a result, too."""
        return self.folder / "failed.txt"

    @property
    def done(self) -> bool:
        """Whether there is nothing left to train."""
        return self.run.card.is_file() or self.failure.is_file()

    def open(self) -> AbstractContextManager[Run]:
        """Begin the run, or go on with it.

        Raises:
            BusyError: another process has it.
            InterflowError: the run in the folder was begun with another recipe.
        """
        if not self.run.recipe.is_file():
            return Run.create(self.folder, self.recipe)
        self.require_same(load_recipe(self.run.recipe))
        return Run.open(self.folder)

    def require_same(self, stored: Recipe) -> None:
        """Refuse a run that was begun with another recipe, such as one of an earlier version of the paper's.

        Raises:
            InterflowError: it was; names the settings.
        """
        if differing := [n for n, value in self.recipe if n not in SPEED_ONLY and value != getattr(stored, n)]:
            raise InterflowError(
                f"{self.folder} was begun with another recipe ({', '.join(differing)}); remove it, or give another "
                "--runs."
            )


@cache
def paper_recipe(data: str) -> Recipe:
    """The paper's, for a data set; read once, as every cell of hundreds is compared with it."""
    return resolve_recipe("paper", {"data": data})


def departures(recipe: Recipe) -> list[str]:
    """Settings in which a recipe departs from the paper's for its data set, as they stand in names of files.

    Those that a table sets (backbone, method, seed) and those that change no figure are left out.
    """
    paper = paper_recipe(recipe.data)
    left_out = SPEED_ONLY | {"backbone", "method", "seed"}
    return [
        name + "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in str(value))
        for name, value in recipe
        if name not in left_out and value != getattr(paper, name)
    ]


def hardware(device: torch.device) -> str:
    """What a figure was measured on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{model}, {threads} thread{'s' if threads > 1 else ''}"


class Grid:
    """Cells of one data set that take turns on one device, step by step.

    Args:
        cells: to train, in this order; they differ in network and seed only.
        device: to train on.
        jobs: cells side by side.
        stop: from `stop_signals`.
        until: by time.monotonic(), when to stop as if by a signal.
        keep_checkpoints: of trained cells; one takes eight bytes a parameter.
        report: called with every cell that is done, after it is.
    """

    def __init__(
        self,
        cells: Iterable[Cell],
        device: torch.device,
        *,
        jobs: int,
        stop: list[int],
        until: float,
        keep_checkpoints: bool,
        report: Callable[[Cell], None],
    ) -> None:
        self.cells, self.device, self.jobs, self.stop, self.until = list(cells), device, jobs, stop, until
        self.keep_checkpoints, self.report = keep_checkpoints, report
        self.data: ImageData = load_data(self.cells[0].recipe).to(device)
        self.conditions: Mapping[str, Any] = {
            "hardware": hardware(device),
            "jobs": jobs,
            "train_images": len(self.data.train),
        }
        self.finisher = ThreadPoolExecutor(1)
        every = 1 if sys.stderr.isatty() else LOG_EVERY_S
        self.bar: tqdm[Any] = tqdm(total=0, unit="step", mininterval=every, smoothing=0.01)

    def train(self) -> None:
        """Train until all cells are done, or it is time to stop; what was begun is saved.

        A cell that another process has is skipped, and tried once more at the end.

        Raises:
            InterflowError: a cell cannot be trained for a reason that is not its network's; the others are saved.
        """
        with self.finisher, self.bar:
            busy = self._train(self.cells)
            self._train(busy)

    def _train(self, cells: list[Cell]) -> list[Cell]:
        """One pass over the cells; returns those that were busy."""
        waiting, busy, problems = deque(cells), [], []
        active: dict[Cell, Generator[bool, None, End]] = {}
        self._expect(sum(map(self._steps, cells)))
        while True:
            if not self.stop and time.monotonic() > self.until:
                self.stop.append(TIME_IS_UP)
            while waiting and len(active) < self.jobs and not self.stop:
                cell = waiting.popleft()
                active[cell] = self._work(cell)
                self.bar.set_description(f"{len(active)} cells in flight, {len(waiting)} waiting", refresh=False)
            if not active:
                break
            moved = False
            for cell, work in list(active.items()):
                try:
                    moved |= next(work)
                    continue
                except StopIteration as ended:
                    end = ended.value
                except Exception as error:  # whatever it is, the others save their state first
                    problems.append(error)
                    self.stop.append(TIME_IS_UP)
                    end = "stopped"
                del active[cell]
                moved = True
                if end == "busy":
                    busy.append(cell)
                    self._expect(-self._steps(cell))
            if not moved:
                time.sleep(WAIT_S)
        if problems:
            raise problems[0]
        return busy

    def _work(self, cell: Cell) -> Generator[bool, None, End]:
        """Train one cell, yielding after every step; what is yielded says whether anything was done meanwhile."""
        try:
            with cell.open() as run:
                if cell.done:  # by another process, meanwhile
                    self.report(cell)
                    self._expect(-self._steps(cell))
                    return "trained"
                try:
                    yield from self._train_cell(cell, run)
                except NotFiniteError as error:
                    write_text(cell.failure, f"{error}\n")
                    self._drop_checkpoint(run)
                    self.report(cell)
                    return "failed"
        except BusyError:
            return "busy"
        except StoppedError:
            return "stopped"
        return "trained"

    def _train_cell(self, cell: Cell, run: Run) -> Generator[bool, None, None]:
        recipe = cell.recipe
        network = build_network(recipe, len(self.data.classes), self.data.spec, begun=run.checkpoint.is_file())
        training = Training(network, self.data, recipe, run, self.device, stop=self.stop, quiet=True)
        self._expect(-training.epoch * training.steps_per_epoch - training.step)
        for _ in training.steps():
            self.bar.update()
            yield True
        write_text(run.folder / CONDITIONS, json.dumps(self.conditions) + "\n")
        # In a thread of its own: fitting and drawing take seconds, in which the others go on.
        finishing = self.finisher.submit(self._finish, network, cell, run)
        while not finishing.done():
            yield False
        finishing.result()

    def _finish(self, network: Interflow, cell: Cell, run: Run) -> None:
        own_stream = torch.cuda.stream(torch.cuda.Stream()) if self.device.type == "cuda" else nullcontext()
        with own_stream:
            finish(network, self.data, cell.recipe, run)
        self._drop_checkpoint(run)
        self.report(cell)

    def _drop_checkpoint(self, run: Run) -> None:
        if not self.keep_checkpoints:
            run.checkpoint.unlink(missing_ok=True)

    def _expect(self, steps: int) -> None:
        """So many more steps are to do than was known."""
        self.bar.total = (self.bar.total or 0) + steps

    def _steps(self, cell: Cell) -> int:
        return cell.recipe.epochs * steps_per_epoch(len(self.data.train), cell.recipe.batch_size)
