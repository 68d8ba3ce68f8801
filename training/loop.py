"""The training loop: one, whatever the network, the data and the device."""

import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from model.contract import InterflowError
from model.interflow import Interflow, InterflowOutput, Normalize
from training.augment import augment
from training.calibration import Predictions, branch_accuracy, fused_accuracy
from training.checkpoint import Progress, load_checkpoint, save_checkpoint
from training.data import ImageData
from training.recipe import Recipe
from training.run import Row, Run
from training.splits import Split

EVALUATION_BATCH = 256
"""At most; a small batch size says that memory is short."""
SAVE_EVERY_S = 300
"""Within an epoch; at its end the state is saved anyway."""


class StoppedError(Exception):
    """Training was asked to stop; its state is saved."""


def choose_device(name: str) -> torch.device:
    """The device that "auto", "cpu" or "cuda" stands for.

    Raises:
        InterflowError: "cuda" where torch finds none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InterflowError("device cuda: torch finds no CUDA device; give --device cpu, or auto.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def learning_rate(recipe: Recipe, epoch: int, step: int, steps: int) -> float:
    """Rate of one step, a pure function of where it stands; epochs and steps counted from 0.

    "step" is the paper's (Interflow, Sec. IV-B): constant, and a tenth for the last `drop_epochs`. "one_cycle" rises
    linearly from 0 over `warmup` of all steps and falls along a cosine to 0.
    """
    if recipe.schedule == "step":
        return recipe.lr * (0.1 if epoch >= recipe.epochs - recipe.drop_epochs else 1)
    done = (epoch * steps + step + 1) / (recipe.epochs * steps)
    if done <= recipe.warmup:
        return recipe.lr * done / recipe.warmup
    return recipe.lr * (1 + math.cos(math.pi * (done - recipe.warmup) / (1 - recipe.warmup))) / 2


def trained_groups(network: Interflow, recipe: Recipe) -> list[dict[str, Any]]:
    """What the optimiser gets: parameters in groups, with the factor of their learning rate.

    A frozen backbone is in none, and its parameters ask for no gradients, so that none are computed for it.
    """
    frozen = recipe.freeze == "backbone"
    network.backbone.requires_grad_(not frozen)
    rest = [parameter for name, parameter in network.named_parameters() if not name.startswith("backbone.")]
    groups: list[dict[str, Any]] = [{"params": rest, "factor": 1.0}]
    if not frozen:
        groups.append({"params": list(network.backbone.parameters()), "factor": recipe.backbone_lr})
    return groups


def training_loss(output: InterflowOutput, labels: Tensor, auxiliary: float) -> Tensor:
    """Cross-entropy on the fused logits (the paper's), plus `auxiliary` times its mean over the stages' contributions.

    The second is ours: on w_i * z_i rather than z_i, because the sign and scale of z_i alone mean nothing.

    Args:
        output: of N images and B branches.
        labels: (N,) class indices.
        auxiliary: 0 for the paper's loss.
    """
    loss = functional.cross_entropy(output.logits, labels)
    if auxiliary:
        stages = (output.branch_weights * output.branch_logits).flatten(0, 1)
        loss = loss + auxiliary * functional.cross_entropy(
            stages, labels.repeat_interleave(output.branch_logits.shape[1])
        )
    return loss


def train(network: Interflow, data: ImageData, recipe: Recipe, run: Run, device: torch.device) -> None:
    """Train to the recipe's last epoch, from the run's checkpoint where there is one; saves after every epoch.

    Order, augmentation and rate of each step depend on the seed and the step's number only, so a run that was killed
    and resumed ends, on the CPU, with the same bytes as one that was not.

    Raises:
        StoppedError: SIGINT or SIGTERM came; the state is saved.
        InterflowError: the loss is no longer finite (the last good checkpoint is kept), or the data changed.
    """
    _Training(network, data, recipe, run, device).run_all()


@torch.inference_mode()
def predict(network: Interflow, data: ImageData, split: Split, recipe: Recipe) -> Predictions:
    """Branch logits of every image of a split, without augmentation, in evaluation mode.

    Raises:
        InterflowError: they are not finite.
    """
    device = next(network.parameters()).device
    normalize = Normalize(data.spec.mean, data.spec.std).to(device)
    network.eval()
    outputs = [
        network(normalize(images.to(device))).branch_logits.float().cpu()
        for images, _ in split.in_order(min(EVALUATION_BATCH, 4 * recipe.batch_size), recipe.workers)
    ]
    branch_logits = torch.cat(outputs)
    if not branch_logits.isfinite().all():
        raise InterflowError("the network gives numbers that are not finite; train again with a lower --lr.")
    weights = network.attention.matrix().detach().float().cpu()
    return Predictions(branch_logits.numpy(), weights.numpy().copy(), split.labels.numpy())


class _Training:
    """One run's loop and everything it carries from step to step."""

    def __init__(self, network: Interflow, data: ImageData, recipe: Recipe, run: Run, device: torch.device) -> None:
        self.network, self.data, self.recipe, self.run, self.device = network.to(device), data, recipe, run, device
        self.normalize = Normalize(data.spec.mean, data.spec.std).to(device)
        self.optimizer = torch.optim.SGD(
            trained_groups(network, recipe),
            recipe.lr,
            recipe.momentum,
            weight_decay=recipe.weight_decay,
            nesterov=recipe.nesterov,
        )
        self.epoch, self.step = 0, 0
        # images, loss, right answers of the fused logits and of each stage: summed on the device, read once per epoch
        self.totals = torch.zeros(3 + len(network.stages), dtype=torch.float64, device=device)
        self.rows: list[Row] = []
        if run.checkpoint.is_file():
            self._resume()

    def run_all(self) -> None:
        with _stop_signals() as stop, SummaryWriter(str(self.run.tensorboard), purge_step=self.epoch + 1) as writer:
            while self.epoch < self.recipe.epochs:
                started = time.perf_counter()
                trained = self._train_epoch(stop)
                row = self._row(trained / (time.perf_counter() - started))
                self.epoch, self.step = self.epoch + 1, 0
                self.totals.zero_()
                self.rows.append(row)
                self.run.save_history(self.rows)
                for name, value in row.items():
                    writer.add_scalar(name, value, self.epoch)
                writer.flush()
                self._save()
                print(self._describe(row))
                if stop:
                    raise StoppedError

    def _train_epoch(self, stop: list[int]) -> int:
        """Train the epoch from `self.step` on; returns the images trained."""
        self.network.train()
        if self.recipe.freeze == "backbone":
            self.network.backbone.eval()  # batch norm's statistics and dropout are frozen, too
        order = self._order()
        saved, trained = time.monotonic(), 0
        with tqdm(
            total=len(order), initial=self.step, desc=f"epoch {self.epoch + 1}/{self.recipe.epochs}", unit="step",
            leave=False, disable=None,
        ) as bar:  # fmt: skip
            for images, labels in self._remaining_batches(order, stop):
                self._train_step(images, labels, len(order))
                self.step += 1
                trained += len(labels)
                bar.update()
                if self.step % 20 == 0:
                    self._require_finite()
                    rate = trained / max(bar.format_dict["elapsed"], 1e-9)
                    bar.set_postfix(
                        loss=f"{self._mean(1):.3f}", accuracy=f"{self._mean(2):.1%}", images_s=f"{rate:.0f}"
                    )
                if stop or time.monotonic() - saved > SAVE_EVERY_S:
                    self._save()
                    saved = time.monotonic()
                if stop:
                    raise StoppedError
        return trained

    def _remaining_batches(self, order: list[Tensor], stop: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        try:
            yield from self.data.train.batches(order[self.step :], self.recipe.workers)
        except InterflowError as error:
            if not stop:
                raise
            self._save()  # the signal to stop has ended the processes that read images, too
            raise StoppedError from error

    def _train_step(self, images: Tensor, labels: Tensor, steps: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["factor"] * learning_rate(self.recipe, self.epoch, self.step, steps)
        images = augment(images, self.recipe, self._generator(self.epoch, 1 + self.step)).to(self.device)
        labels = labels.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16"):
            output: InterflowOutput = self.network(self.normalize(images))
            loss = training_loss(output, labels, self.recipe.auxiliary_loss)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            stages = (output.branch_weights * output.branch_logits).argmax(dim=2) == labels[:, None]
            right = (output.logits.argmax(dim=1) == labels).sum()
            self.totals += torch.stack(
                [labels.new_tensor(len(labels)), loss.double() * len(labels), right, *stages.sum(dim=0)]
            )

    def _order(self) -> list[Tensor]:
        """Indices of the epoch's batches. A last batch of one image is left out: batch norm needs two."""
        shuffled = torch.randperm(len(self.data.train), generator=self._generator(self.epoch, 0))
        batches = list(shuffled.split(self.recipe.batch_size))
        return batches[:-1] if len(batches) > 1 and len(batches[-1]) == 1 else batches

    def _generator(self, *where: int) -> torch.Generator:
        seed = np.random.SeedSequence([self.recipe.seed, *where]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(seed[0]))

    def _mean(self, index: int) -> float:
        return float(self.totals[index] / self.totals[0])

    def _row(self, images_per_second: float) -> Row:
        """The epoch's figures. A stage's accuracy is its contribution's: its reading before scales are fitted."""
        self._require_finite()
        names = [stage.name for stage in self.network.stages]
        row: Row = {"epoch": self.epoch + 1, "lr": learning_rate(self.recipe, self.epoch, self.step - 1, self.step)}
        row |= {"train_loss": self._mean(1), "train_accuracy": self._mean(2)}
        row |= {f"train_accuracy/{name}": self._mean(3 + i) for i, name in enumerate(names)}
        if self.data.val:
            held_out = predict(self.network, self.data, self.data.val, self.recipe)
            accuracies = branch_accuracy(held_out, held_out.branch_weights)
            row["val_accuracy"] = fused_accuracy(held_out)
            row |= {f"val_accuracy/{name}": accuracy for name, accuracy in zip(names, accuracies, strict=True)}
        for name, weights in zip(names, self.network.attention.weight.tolist(), strict=True):
            if len(weights) == 1:
                row[f"weight/{name}"] = weights[0]
            else:
                row |= {
                    f"weight/{name}/{label}": value for label, value in zip(self.data.classes, weights, strict=True)
                }
        row["images_per_second"] = images_per_second
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
            raise InterflowError(
                f"the loss is no longer a finite number in epoch {self.epoch + 1}, step {self.step}. {kept}; "
                f"train again with a lower --lr (it was {self.recipe.lr:g}), or --precision float32."
            )

    def _save(self) -> None:
        if self.step:
            self._require_finite()
        progress = Progress(self.epoch, self.step, self.data.fingerprint)
        save_checkpoint(self.run.checkpoint, self.network, self.optimizer, self.totals, progress)

    def _resume(self) -> None:
        progress, totals = load_checkpoint(self.run.checkpoint, self.network, self.optimizer)
        if progress.data != self.data.fingerprint:
            raise InterflowError(
                f"{self.run.folder}: the images are not those the run began with; put them back, or begin a new run."
            )
        self.epoch, self.step = progress.epoch, progress.step
        self.totals.copy_(totals)
        self.rows = self.run.history()[: self.epoch]
        if len(self.rows) < self.epoch:
            raise InterflowError(f"{self.run.metrics}: not a whole history of {self.epoch} epochs; begin a new run.")
        self.run.save_history(self.rows)
        print(f"resuming {self.run.folder} at epoch {self.epoch + 1}, step {self.step + 1}")


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
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
