"""One step of training, on a batch that lies where the network does: as it is written, or replayed as one CUDA graph.

What changes from step to step (which images, what is done to them, the learning rate) is laid out on the device before
an epoch begins, and a step finds its place there by a counter of its own. So nothing has to be handed over while an
epoch lasts, and the whole step, from gathering the images to the optimiser, is the same sequence of kernels every time.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from model.interflow import Interflow, InterflowOutput, Normalize
from training import ranks
from training.augment import Draws, augment
from training.data import ImageData
from training.recipe import Recipe

EAGER_STEPS = 3
"""Before a graph is captured: libraries choose their kernels, and the optimiser makes its buffers."""


class Step:
    """A network's training step, and the state that it carries beside the network's.

    Where several processes train together, each takes its share of every batch, and what is left behind, totals
    included, is the same in all of them.

    Args:
        network: on `device`.
        data: images in memory lie on `device`; those of a folder are handed to each step.
        recipe: how to train.
        steps: of the whole run.
        device: where everything happens.

    Attributes:
        optimizer: over what is trained.
        totals: float64 (3 + B,): images, summed loss, right answers of the fused logits and of each stage's
            contribution, over the epoch so far; on the device, to be read when the host can wait.
    """

    def __init__(self, network: Interflow, data: ImageData, recipe: Recipe, steps: int, device: torch.device) -> None:
        self.network, self.recipe, self.device = network, recipe, device
        self.optimizer = torch.optim.SGD(
            trained_groups(network, recipe, device),
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            nesterov=recipe.nesterov,
            fused=True,
        )
        self._model = ranks.data_parallel(network, device)
        self.totals = torch.zeros(3 + len(network.stages), dtype=torch.float64, device=device)
        self._images = data.train.images if isinstance(data.train.images, Tensor) else None
        self._labels = data.train.labels.to(device)
        self._normalize = Normalize(data.spec.mean, data.spec.std).to(device)
        self._fill = torch.tensor([round(255 * mean) for mean in data.spec.mean], dtype=torch.uint8, device=device)
        self._class_weights = class_weights(data.train.labels).to(device) if recipe.balance == "loss" else None
        # Several processes take plain steps: with the messages between them, neither of the two is tested.
        alone = not ranks.several()
        self._loss = torch.compile(self._forward) if recipe.compile and alone else self._forward
        self._average = [tensor.clone() for tensor in self._floating()] if recipe.ema else None
        self._live: list[Tensor] = []
        self._decay = 1 - 1 / max(1.0, recipe.ema * steps)
        # Of the epoch: draws and rates by step, and the step that comes next.
        self._draws = self._rates = torch.empty(0)
        self._position = torch.zeros(1, dtype=torch.long, device=device)
        self._use_graph = recipe.cuda_graph and device.type == "cuda" and self._images is not None and alone
        self._graph: torch.cuda.CUDAGraph | None = None
        self._eager_steps = 0

    def begin_epoch(self, draws: Tensor, rates: Tensor, step: int) -> None:
        """Lay out an epoch.

        Args:
            draws: (M, fields of `Draws`), of all its images.
            rates: float32, the learning rate of each of its steps.
            step: to go on at, counted from 0.
        """
        if self._draws.shape == draws.shape:  # a graph reads them where they were when it was captured
            self._draws.copy_(draws)
            self._rates.copy_(rates)
        else:
            self._draws, self._rates = draws.to(self.device), rates.to(self.device)
        self._position.fill_(step)

    def take(self, step: int, images: Tensor | None = None) -> None:
        """Train on the epoch's batch number `step`.

        Args:
            step: one more than the last call's.
            images: uint8 (N, height, width, channels), this process's share, where they are not all in memory.
        """
        size = self.recipe.batch_size
        rows = self._draws[step * size : (step + 1) * size]
        if self._use_graph and len(rows) == size:
            if self._graph is None and self._eager_steps == EAGER_STEPS:
                self._graph = self._capture()
            if self._graph is not None:
                self._graph.replay()
                return
        self._train(rows, self._rates[step], images)
        self._eager_steps += 1

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the moving average in the network's place, where the recipe has one, while the context lasts.

        Checkpoints are saved and loaded in it: the network in the file is then the one to serve, and what is being
        trained is part of `extra_state`.
        """
        if self._average is None:
            yield
            return
        self._live = [tensor.clone() for tensor in self._floating()]
        self._set(self._average)
        try:
            yield
        finally:
            torch._foreach_copy_(self._average, self._floating())  # it may have been loaded
            self._set(self._live)

    def keep_average(self) -> None:
        """Put the moving average in the network's place for good, where the recipe has one."""
        if self._average is not None:
            self._set(self._average)

    def extra_state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps beside the network and the optimiser, by name: these very tensors."""
        names = [name for name, tensor in self.network.state_dict().items() if tensor.is_floating_point()]
        return {"totals": self.totals} | {
            f"live.{name}": tensor for name, tensor in zip(names, self._live, strict=False)
        }

    def _capture(self) -> torch.cuda.CUDAGraph:
        size = self.recipe.batch_size
        whole = len(self._draws) // size * size
        draws, graph = self._draws[:whole].view(-1, size, self._draws.shape[1]), torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        # thread_local: other threads (a progress bar's, a writer's) may go on calling CUDA meanwhile
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            self._train(draws.index_select(0, self._position)[0], self._rates.index_select(0, self._position)[0])
        return graph

    def _train(self, rows: Tensor, rate: Tensor, images: Tensor | None = None) -> None:
        """The step itself, without a word from the host to the device or back."""
        draws = Draws(*ranks.share(rows).unbind(1))
        labels = self._labels[draws.image]
        if self._images is not None:
            images = self._images[draws.image]
        assert images is not None  # noqa: S101 - they are in memory, or handed over
        inputs = self._normalize(augment(images.to(self.device), draws, self.recipe, self._fill))
        for group in self.optimizer.param_groups:
            group["lr"].copy_(rate * group["factor"])
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16"):
            loss, logits, stages = self._loss(inputs, labels, self._divisor(rows))
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            right = (logits.argmax(dim=1) == labels).sum()
            stages_right = (stages.argmax(dim=2) == labels[:, None]).sum(dim=0)
            count = torch.full((), len(labels), device=self.device)
            summed_loss = loss.double() * (len(rows) / ranks.size())
            self.totals += ranks.summed(torch.stack([count, summed_loss, right, *stages_right]))
            if self._average is not None:
                torch._foreach_lerp_(self._average, self._floating(), 1 - self._decay)
        self._position += 1

    def _divisor(self, rows: Tensor) -> Tensor | None:
        """What a process divides its share's summed loss by, so that the mean over the processes is the batch's loss.

        None where one process has the whole batch and takes the mean itself.
        """
        if not ranks.several():
            return None
        weights = torch.ones(len(rows), device=self.device)
        if self._class_weights is not None:
            weights = self._class_weights[self._labels[Draws(*rows.unbind(1)).image]]
        return weights.sum() / ranks.size()

    def _forward(self, inputs: Tensor, labels: Tensor, divisor: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised images (N, channels, height, width) to the loss, logits (N, K) and contributions (N, B, K)."""
        output: InterflowOutput = self._model(inputs)
        loss = training_loss(output, labels, self.recipe, self._class_weights, divisor)
        return loss, output.logits, output.branch_weights * output.branch_logits

    def _floating(self) -> list[Tensor]:
        """Parameters and batch norm's statistics: all of the network that is averaged."""
        return [tensor.detach() for tensor in self.network.state_dict().values() if tensor.is_floating_point()]

    def _set(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self._floating(), values)


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


def trained_groups(network: Interflow, recipe: Recipe, device: torch.device) -> list[dict[str, Any]]:
    """What the optimiser gets: parameters in groups, each with its rate (a tensor, set by the step) and rate's factor.

    A frozen backbone is in none, and its parameters ask for no gradients, so that none are computed for it.
    """
    frozen = recipe.freeze == "backbone"
    network.backbone.requires_grad_(not frozen)
    rest = [parameter for name, parameter in network.named_parameters() if not name.startswith("backbone.")]
    groups: list[dict[str, Any]] = [{"params": rest, "factor": 1.0}]
    if not frozen:
        groups.append({"params": list(network.backbone.parameters()), "factor": recipe.backbone_lr})
    return [group | {"lr": torch.zeros((), device=device)} for group in groups]


def class_weights(labels: Tensor) -> Tensor:
    """Weight of each class in a balanced loss, (K,): images / (classes * images of the class), so 1 on average."""
    counts = labels.bincount()
    return len(labels) / (len(counts) * counts)


def training_loss(
    output: InterflowOutput,
    labels: Tensor,
    recipe: Recipe,
    class_weights: Tensor | None = None,
    divisor: Tensor | None = None,
) -> Tensor:
    """Cross-entropy on the fused logits (the paper's), plus two terms of ours, means over the stages' contributions.

    `auxiliary_loss` times their cross-entropy, and `distillation` times the Kullback-Leibler divergence of each from
    the fused answer, whose gradient is stopped. It is taken over B, as the mean contribution: as large as one of those
    that it teaches, which add up to it, and at B, a temperature, it shows what it makes of the other classes (Hinton et
    al. 2015; from the network's own end, Zhang et al. 2019). On w_i * z_i rather than z_i, because the sign and scale
    of z_i alone mean nothing.

    Args:
        output: of N images and B branches.
        labels: (N,) class indices.
        recipe: says how much the two count, and how smooth the labels are.
        class_weights: (K,), or None where every image counts the same.
        divisor: of the sum over the images, which need not be a whole batch; None for their own weight: the mean.
    """
    weight = (len(labels) if class_weights is None else class_weights[labels].sum()) if divisor is None else divisor

    def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(
            logits, labels, class_weights, reduction="sum", label_smoothing=recipe.label_smoothing
        )

    loss = cross_entropy(output.logits, labels)
    if not (recipe.auxiliary_loss or recipe.distillation):
        return loss / weight
    branches = output.branch_logits.shape[1]
    stages = (output.branch_weights * output.branch_logits).flatten(0, 1)
    if recipe.auxiliary_loss:
        loss = loss + recipe.auxiliary_loss * cross_entropy(stages, labels.repeat_interleave(branches)) / branches
    if recipe.distillation:
        taught = functional.log_softmax(output.logits.detach() / branches, dim=1).repeat_interleave(branches, dim=0)
        apart = functional.kl_div(functional.log_softmax(stages, dim=1), taught, reduction="none", log_target=True)
        if class_weights is not None:
            apart = apart * class_weights[labels].repeat_interleave(branches)[:, None]
        loss = loss + recipe.distillation * apart.sum() / branches
    return loss / weight
