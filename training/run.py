"""A run's folder: recipe, history, checkpoint and, once it is finished, the model card."""

import csv
import io
import itertools
import json
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from operator import itemgetter
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from model.contract import InterflowError, ModelCard
from training.files import write_text
from training.recipe import Recipe

RUNS = Path("runs")
CUT_FILE = "cut.json"
"""In the folder of a run that `training/depth.py` fine-tuned: what it was cut from."""
SAMPLES = 20
"""Test images kept with a run: batches of 1, 2 and 17 for export to check the artefact with."""

Row = dict[str, float]
"""One epoch's figures by column name."""


class BusyError(InterflowError):
    """Another process has the run."""


class Run:
    """Paths and files of one run.

    ::

        recipe.yaml              the resolved configuration
        metrics.csv              one row per epoch
        tensorboard/             the same
        checkpoint.safetensors   the state to resume from
        card.json                the model card; its being there says that the run is finished
        samples.npy              a few test images, for export to check the artefact with
        accuracy.png, weights.png, confusion.png
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe = folder / "recipe.yaml"
        self.metrics = folder / "metrics.csv"
        self.tensorboard = folder / "tensorboard"
        self.checkpoint = folder / "checkpoint.safetensors"
        self.card = folder / "card.json"
        self.samples = folder / "samples.npy"
        self._lock = FileLock(folder / ".lock")

    @classmethod
    @contextmanager
    def create(cls, folder: Path, recipe: Recipe, begin: Callable[[], None] | None = None) -> Iterator["Run"]:
        """Make the folder and save the recipe in it; other processes are kept out while the context lasts.

        Args:
            folder: of the run.
            recipe: to save.
            begin: writes what is to be there before the recipe, which makes the folder a run.

        Raises:
            BusyError: another process has put a run there meanwhile.
        """
        folder.mkdir(parents=True, exist_ok=True)
        run = cls(folder)
        with run._locked():
            if run.recipe.exists():
                raise BusyError(f"{folder}: another process has begun a run there meanwhile; start again.")
            if begin:
                begin()
            write_text(run.recipe, recipe.to_yaml())
            yield run

    @classmethod
    @contextmanager
    def open(cls, folder: Path) -> Iterator["Run"]:
        """Open a run to go on with it; other processes are kept out while the context lasts.

        Raises:
            InterflowError: not a run's folder, or (BusyError) another process has it.
        """
        run = cls(folder)
        if not run.recipe.is_file():
            raise InterflowError(
                f"{folder}: not a run's folder (no {run.recipe.name}); give --resume one below {RUNS}/."
            )
        with run._locked():
            for leftover in folder.glob(".*-[0-9]*.*"):  # half-written, by a process that was killed
                leftover.unlink()
            yield run

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise BusyError(f"{self.folder}: another process is training this run.") from error
        try:
            yield
        finally:
            self._lock.release()

    @property
    def resume_command(self) -> str:
        """What a user types to go on with the run."""
        return f"python training/train.py --resume {shlex.quote(str(self.folder))}"

    def history(self) -> list[Row]:
        """The epochs so far.

        Raises:
            InterflowError: the file was changed or damaged.
        """
        if not self.metrics.is_file():
            return []
        try:
            with self.metrics.open(newline="", encoding="utf-8") as file:
                return [{name: json.loads(value) for name, value in row.items()} for row in csv.DictReader(file)]
        except (ValueError, TypeError, csv.Error) as error:
            raise InterflowError(f"{self.metrics}: not the history of a run ({error}); begin a new run.") from error

    def save_history(self, rows: list[Row]) -> None:
        """Write all epochs; called after each, so that the file is whole at any moment."""
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.metrics, text.getvalue())

    def load_samples(self) -> np.ndarray:
        """The test images kept with the run, uint8 (20, height, width, channels).

        Raises:
            InterflowError: they are missing or damaged.
        """
        spec = self.finished_card().input
        try:
            samples = np.load(self.samples, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InterflowError(f"{self.samples}: cannot be read ({error}); train the run again.") from error
        shape = (SAMPLES, spec.height, spec.width, spec.channels)
        if (samples.shape, samples.dtype) != (shape, np.uint8):
            raise InterflowError(f"{self.samples}: not {SAMPLES} images of the network's size; train the run again.")
        return samples

    def finished_card(self) -> ModelCard:
        """The card of a finished run.

        Raises:
            InterflowError: no run there, or one that is not finished.
        """
        if not self.recipe.is_file():
            raise InterflowError(f"{self.folder}: not a run's folder (no {self.recipe.name}); train one first.")
        if not self.card.is_file():
            raise InterflowError(f"{self.folder}: the run is not finished; finish it with `{self.resume_command}`.")
        return ModelCard.from_json(self.card.read_bytes(), self.card)


def choose_folder(out: Path | None, recipe: Recipe) -> Path:
    """`out`, or a new folder below runs/ named after the time, data, method and seed.

    Raises:
        InterflowError: `out` is there already and not empty.
    """
    if out is None:
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{Path(recipe.data).resolve().name}-{recipe.method}-seed{recipe.seed}"
        names = (RUNS / (name if copy == 1 else f"{name}-{copy}") for copy in itertools.count(1))
        return next(folder for folder in names if not folder.exists())
    if out.exists() and (not out.is_dir() or any(path.name != ".lock" for path in out.iterdir())):
        raise InterflowError(f"{out} is there already; give --out another folder, or --resume {out}.")
    return out


def newest_finished(runs: Path = RUNS) -> Run:
    """The run whose card is the latest; a fine-tuned cut of one only where there are no others.

    A card that cannot be read is left out, and it is said.

    Raises:
        InterflowError: none is finished.
    """
    finished: list[tuple[bool, datetime, Run]] = []
    for path in sorted(runs.glob("*/card.json")):
        run = Run(path.parent)
        try:
            finished.append((not (run.folder / CUT_FILE).exists(), run.finished_card().provenance.created, run))
        except InterflowError as error:
            print(f"note: left out: {error}")
    if not finished:
        begun = sorted(path.parent for path in runs.glob("*/recipe.yaml"))
        how = f"finish one with `{Run(begun[-1]).resume_command}`" if begun else "train one: `python training/train.py`"
        raise InterflowError(f"no finished run below {runs}/; {how}.")
    return max(finished, key=itemgetter(0, 1))[2]


def git_revision() -> str | None:
    """Commit of the code, with "-dirty" where tracked files were changed; None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - made above
    except FileNotFoundError:
        return None
    return answer.stdout.strip() or None
