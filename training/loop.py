"""The training loop: one, whatever the network, the data and the device."""

import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from model.contract import InterflowError
from model.interflow import Interflow, Normalize
from training import ranks
from training.augment import draw_epoch
from training.calibration import Predictions, branch_accuracy, held_out_figures
from training.checkpoint import Progress, load_checkpoint, save_checkpoint
from training.data import ImageData
from training.recipe import Recipe
from training.run import Row, Run
from training.splits import Split
from training.step import Step, learning_rate

EVALUATION_BATCH = 256
"""At most; a small batch size says that memory is short."""
SAVE_EVERY_S = 300
"""Within an epoch."""
SHARE_OF_SAVING = 0.05
"""Most of the time that saving after epochs may take: on a GPU an epoch can be shorter than writing its state."""
SHOW_EVERY_S = 5
"""Figures beside the progress bar: reading them makes the host wait for the device."""


_END = object()


class StoppedError(Exception):
    """Training was asked to stop; its state is saved."""


class NotFiniteError(InterflowError):
    """The loss, the weights or the answers are no longer finite numbers."""


def choose_device(name: str) -> torch.device:
    """The device that "auto", "cpu" or "cuda" stands for.

    Raises:
        InterflowError: "cuda" where torch finds none, or fewer than there are processes on this machine.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InterflowError("device cuda: torch finds no CUDA device; give --device cpu, or auto.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return ranks.choose_cuda() if name == "cuda" else torch.device(name)


def train(network: Interflow, data: ImageData, recipe: Recipe, run: Run, device: torch.device) -> None:
    """Train to the recipe's last epoch, from the run's checkpoint where there is one; saves as it goes.

    Order, augmentation and rate of each step depend on the seed and the step's number only, so a run that was killed
    and resumed ends, on the CPU, with the same bytes as one that was not.

    Raises:
        StoppedError: SIGINT or SIGTERM came; the state is saved.
        InterflowError: the loss is no longer finite (the last good checkpoint is kept), or the data changed.
    """
    with stop_signals() as stop:
        for _ in Training(network, data, recipe, run, device, stop=stop, quiet=not ranks.first()).steps():
            pass


@torch.inference_mode()
def predict(network: Interflow, data: ImageData, split: Split, recipe: Recipe) -> Predictions:
    """Branch logits of every image of a split, without augmentation, in evaluation mode.

    Several processes share the images, and each gets the whole.

    Raises:
        NotFiniteError: they are not finite.
    """
    device = next(network.parameters()).device
    normalize = Normalize(data.spec.mean, data.spec.std).to(device)
    network.eval()
    share = ranks.share(torch.arange(len(split)))
    order = share.split(min(EVALUATION_BATCH, 4 * recipe.batch_size)) if len(share) else []
    outputs = [torch.empty(0, len(network.stages), network.num_classes)]
    outputs += (
        network(normalize(images.to(device))).branch_logits.float().cpu()
        for images, _ in split.batches(order, ranks.workers(recipe.workers))
    )
    branch_logits = ranks.put_together(torch.cat(outputs), len(split))
    if not branch_logits.isfinite().all():
        raise NotFiniteError("the network gives numbers that are not finite; train again with a lower --lr.")
    weights = network.attention.matrix().detach().float().cpu()
    return Predictions(branch_logits.numpy(), weights.numpy().copy(), split.labels.numpy())


class Training:
    """One run's loop, and everything that it carries from step to step.

    Args:
        network, data: moved to `device`.
        recipe: how to train.
        run: where the state is saved, and gone on from where there is one; by the first process alone where several
            train together.
        device: to train on.
        stop: from `stop_signals`.
        quiet: print nothing; several runs side by side have one bar of their own.
    """

    def __init__(
        self,
        network: Interflow,
        data: ImageData,
        recipe: Recipe,
        run: Run,
        device: torch.device,
        *,
        stop: list[int],
        quiet: bool = False,
    ) -> None:
        self.network, self.data = network.to(device), data.to(device)
        if recipe.channels_last:
            self.network.to(memory_format=torch.channels_last)
        self.recipe, self.run, self.device, self.stop, self.quiet = recipe, run, device, stop, quiet
        self.steps_per_epoch = steps_per_epoch(len(data.train), recipe.batch_size)
        self.state = Step(self.network, self.data, recipe, recipe.epochs * self.steps_per_epoch, device)
        self.epoch, self.step = 0, 0
        self.rows: list[Row] = []
        self.saved_at, self.saving_takes = time.monotonic(), 0.0
        if ranks.from_first(run.checkpoint.is_file):
            self._resume()
        ranks.seed(recipe.seed, self.epoch, self.step)
        self.stream: torch.cuda.Stream | None = None
        if device.type == "cuda" and not ranks.several():
            torch.cuda.synchronize()  # all so far was done on another stream
            self.stream = torch.cuda.Stream()

    def steps(self) -> Iterator[None]:
        """Train, yielding after every step, so that several runs can take turns on one device.

        At the end the network is what is to be served: the moving average of its weights where the recipe has one.

        Raises:
            StoppedError, InterflowError: as `train`.
        """
        steps = self._steps()
        while True:
            with torch.cuda.stream(self.stream):
                if next(steps, _END) is _END:
                    return
            yield

    def _steps(self) -> Iterator[None]:
        with self._writer() as writer:
            while self.epoch < self.recipe.epochs:
                started, first = time.perf_counter(), self.step
                yield from self._train_epoch()
                row = self._row(self._seen(self.step) - self._seen(first), started)
                self.epoch, self.step = self.epoch + 1, 0
                self.state.totals.zero_()
                self.rows.append(row)
                if writer:
                    self.run.save_history(self.rows)
                    for name, value in row.items():
                        writer.add_scalar(name, value, self.epoch)
                    writer.flush()
                stopping = self._is_to_stop()
                if self.epoch == self.recipe.epochs or stopping or self._saving_is_due():
                    self.save()
                if not self.quiet:
                    print(self._describe(row))
                if stopping:
                    raise StoppedError
        self.state.keep_average()
        if self.stream:
            self.stream.synchronize()

    def _writer(self) -> AbstractContextManager[SummaryWriter | None]:
        if not ranks.first():
            return nullcontext()
        return SummaryWriter(str(self.run.tensorboard), purge_step=self.epoch + 1)

    def _train_epoch(self) -> Iterator[None]:
        draws = draw_epoch(self.data.train.labels, self.data.size, self.recipe, self.epoch)
        steps = range(self.steps_per_epoch)
        rates = [learning_rate(self.recipe, self.epoch, step, len(steps)) for step in steps]
        self.state.begin_epoch(draws, torch.tensor(rates), self.step)
        self.network.train()
        if self.recipe.freeze == "backbone":
            self.network.backbone.eval()  # batch norm's statistics and dropout are frozen, too
        shown = time.monotonic()
        with tqdm(
            total=len(steps), initial=self.step, desc=f"epoch {self.epoch + 1}/{self.recipe.epochs}", unit="step",
            leave=False, disable=True if self.quiet else None,
        ) as bar:  # fmt: skip
            for images in self._remaining_images(draws[:, 0]):
                self.state.take(self.step, images)
                self.step += 1
                bar.update()
                if time.monotonic() - shown > SHOW_EVERY_S and ranks.first():
                    self._require_finite()
                    bar.set_postfix(loss=f"{self._mean(1):.3f}", accuracy=f"{self._mean(2):.1%}")
                    shown = time.monotonic()
                if time.monotonic() - self.saved_at > SAVE_EVERY_S:
                    self.save()
                yield

    def _remaining_images(self, index: Tensor) -> Iterator[Tensor | None]:
        """The images of each step to come where they are files; None where the step finds them itself.

        Before each, and after the last, is the moment to stop: then, with several processes, all have the same steps
        behind them, and each the images of the next.
        """
        order = list(index.split(self.recipe.batch_size))[self.step : self.steps_per_epoch]
        images: Iterator[Tensor | None] = iter([None] * len(order))
        if not isinstance(self.data.train.images, Tensor):
            shares = [ranks.share(indices) for indices in order]
            batches = self.data.train.batches(shares, ranks.workers(self.recipe.workers))
            images = (of_step for of_step, _ in batches)
        for last in [False] * len(order) + [True]:
            of_step, problem = None, None
            try:
                of_step = next(images, None)
            except InterflowError as error:  # a signal to stop has perhaps ended the processes that read images, too
                problem = error
            if self._is_to_stop(problem):
                self.save()
                raise StoppedError from problem
            if not last:
                yield of_step

    def _is_to_stop(self, problem: InterflowError | None = None) -> bool:
        """Whether this process, or any that trains with it, was asked to stop.

        Raises:
            InterflowError: none was, and this one has a problem, or another has.
        """
        asked, failed = ranks.any_of(bool(self.stop), problem is not None)
        if asked or not failed:
            return asked
        raise problem or InterflowError(ranks.OTHER_ENDED)

    def _mean(self, index: int) -> float:
        return float(self.state.totals[index] / self.state.totals[0])

    def _seen(self, step: int) -> int:
        """Images of an epoch's first steps; the last batch may be a smaller one."""
        return min(self.recipe.batch_size * step, len(self.data.train))

    def _row(self, trained: int, started: float) -> Row:
        """The epoch's figures. A stage's accuracy is its contribution's: its reading before scales are fitted."""
        self._require_finite()  # which waits for the device, so that the time is the epoch's
        images_per_second = trained / (time.perf_counter() - started)
        names = [stage.name for stage in self.network.stages]
        row: Row = {"epoch": self.epoch + 1, "lr": learning_rate(self.recipe, self.epoch, self.step - 1, self.step)}
        row |= {"train_loss": self._mean(1), "train_accuracy": self._mean(2)}
        row |= {f"train_accuracy/{name}": self._mean(3 + i) for i, name in enumerate(names)}
        with self.state.averaged():
            row |= self._held_out_row(names)
        row["images_per_second"] = images_per_second
        return row

    def _held_out_row(self, names: list[str]) -> Row:
        """Figures of what was held out, and the learned weights, of the network as it would be served."""
        row: Row = {}
        if self.data.val:
            held_out = predict(self.network, self.data, self.data.val, self.recipe)
            accuracies = branch_accuracy(held_out, held_out.branch_weights)
            row |= held_out_figures(held_out)
            row |= {f"val_accuracy/{name}": accuracy for name, accuracy in zip(names, accuracies, strict=True)}
        for name, weights in zip(names, self.network.attention.weight.tolist(), strict=True):
            if len(weights) == 1:
                row[f"weight/{name}"] = weights[0]
            else:
                row |= {
                    f"weight/{name}/{label}": value for label, value in zip(self.data.classes, weights, strict=True)
                }
        return row

    def _describe(self, row: Row) -> str:
        held_out = f", held out {row['val_accuracy']:.2%}" if "val_accuracy" in row else ""
        return (
            f"epoch {row['epoch']:.0f}/{self.recipe.epochs}: loss {row['train_loss']:.4f}, accuracy "
            f"{row['train_accuracy']:.2%}{held_out}, {row['images_per_second']:.0f} images/s"
        )

    def _require_finite(self) -> None:
        finite = math.isfinite(self._mean(1)) and all(bool(p.isfinite().all()) for p in self.network.parameters())
        if not finite:
            kept = (
                f"The last good state is {self.run.checkpoint}" if self.run.checkpoint.is_file() else "Nothing is saved"
            )
            raise NotFiniteError(
                f"the loss is no longer a finite number in epoch {self.epoch + 1}, step {self.step}. {kept}; "
                f"train again with a lower --lr (it was {self.recipe.lr:g}), or --precision float32."
            )

    def _saving_is_due(self) -> bool:
        """After an epoch: whether saving now, too, leaves most of the time for training."""
        return self.saving_takes <= SHARE_OF_SAVING * (time.monotonic() - self.saved_at)

    def save(self) -> None:
        """Write the state as it is to the run's checkpoint; it is the same in all processes, and one writes it."""
        if not ranks.first():
            return
        if self.step:
            self._require_finite()
        started = time.monotonic()
        progress = Progress(self.epoch, self.step, self.data.fingerprint)
        with self.state.averaged():
            save_checkpoint(self.run.checkpoint, self.network, self.state.optimizer, self.state.extra_state(), progress)
        self.saved_at = time.monotonic()
        self.saving_takes = self.saved_at - started

    def _resume(self) -> None:
        with self.state.averaged():
            progress = load_checkpoint(
                self.run.checkpoint, self.network, self.state.optimizer, self.state.extra_state()
            )
        if progress.data != self.data.fingerprint:
            raise InterflowError(
                f"{self.run.folder}: the images are not those the run began with; put them back, or begin a new run."
            )
        self.epoch, self.step = progress.epoch, progress.step
        self.rows = ranks.from_first(self._history)
        if not self.quiet:
            print(f"resuming {self.run.folder} at epoch {self.epoch + 1}, step {self.step + 1}")

    def _history(self) -> list[Row]:
        rows = self.run.history()[: self.epoch]
        if len(rows) < self.epoch:
            raise InterflowError(f"{self.run.metrics}: not a whole history of {self.epoch} epochs; begin a new run.")
        self.run.save_history(rows)
        return rows


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Batches of an epoch. A last one of one image is left out: batch norm needs two."""
    return max(1, math.ceil(images / batch_size) - (images % batch_size == 1))


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that SIGINT and SIGTERM append to, so that a step is never cut in two; a second one ends at once."""
    received: list[int] = []

    def stop(number: int, _frame: object) -> None:
        if received:
            sys.exit(128 + number)
        received.append(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
