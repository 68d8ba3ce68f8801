"""Ways to draw where a network saw a class, under one interface: ours, gradients, occlusion, and two that know nothing.

A method takes an `Interflow` network, normalised images (N, channels, height, width) and a class for each, and gives
signed maps, float64 (N, height, width). Maps of a coarser grid are brought to the image's by `model.explain.spread`,
whoever made them, and all explain the same number: the fused logit of the class less the mean of all classes' logits,
which is what our evidence sums to. (For the gradient methods that or the plain logit is the same within noise.)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from model.contract import InterflowError
from model.explain import contribution_maps, evidence_maps, spread
from model.interflow import Interflow

STEPS = 32
"""Of integrated gradients."""
OCCLUDED = 64
"""Squares that occlusion tries, 8 by 8 of them."""


def require_libraries() -> dict[str, str]:
    """Versions of what our maps are compared with.

    Raises:
        InterflowError: not installed; says how to.
    """
    try:
        return {name: version(name) for name in ("captum", "grad-cam")}
    except PackageNotFoundError as error:
        raise InterflowError(
            f"{error.name} is not installed; `uv run --extra train --group explanations python "
            "benchmarks/explanations.py` brings what our maps are compared with."
        ) from error


@dataclass(frozen=True)
class Method:
    """A way to explain.

    Attributes:
        name: for tables.
        kind: ours, gradient, occlusion, or nothing: it does not look at the network.
        explain: network, images and classes to maps.
    """

    name: str
    kind: Literal["ours", "gradient", "occlusion", "nothing"]
    explain: Callable[[Interflow, Tensor, Tensor], np.ndarray]


class Explained(nn.Module):
    """The network as libraries want it: images to (N, K), of which one column is explained."""

    def __init__(self, network: Interflow) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Fused logits less their mean over the classes."""
        logits: Tensor = self.network(images).logits
        return logits - logits.mean(dim=1, keepdim=True)


def evidence_of(network: Interflow, images: Tensor, classes: Tensor) -> list[np.ndarray]:
    """Each stage's evidence for the class of each image, (N, h, w) on the stage's own grid: one forward pass."""
    with torch.no_grad():
        output = network(images)
    rows = np.arange(len(classes))
    maps = contribution_maps([m.numpy() for m in output.branch_maps], output.branch_weights.detach().numpy())
    return [stage[rows, classes.numpy()] for stage in evidence_maps(maps)]


def ours(network: Interflow) -> list[Method]:
    """The fused evidence map, and those of the stages alone."""

    def fused(network: Interflow, images: Tensor, classes: Tensor) -> np.ndarray:
        size = (images.shape[-2], images.shape[-1])
        return np.sum([spread(stage, size) for stage in evidence_of(network, images, classes)], axis=0)

    def alone(index: int) -> Method:
        def explain(network: Interflow, images: Tensor, classes: Tensor) -> np.ndarray:
            return spread(evidence_of(network, images, classes)[index], (images.shape[-2], images.shape[-1]))

        return Method(f"evidence, {network.stages[index].name} alone", "ours", explain)

    return [Method("evidence, fused", "ours", fused), *(alone(i) for i in range(len(network.stages)))]


def blocks_of(network: Interflow) -> dict[str, nn.Module]:
    """The modules that class activation maps can look at, by point; the map of a point is what its module returns.

    Raises:
        InterflowError: the backbone is no chain of blocks.
    """
    blocks = getattr(network.backbone, "blocks", None)
    if blocks is None:
        raise InterflowError(f"{type(network.backbone).__name__} is no chain of blocks; choose a run of vgg16.")
    return {point.name: block for point, block in zip(network.backbone.points, blocks, strict=False)}


CAMS = ("Grad-CAM", "HiResCAM")


def class_activation(cam: str, point: str) -> Method:
    """Grad-CAM or HiResCAM of pytorch-grad-cam behind a layer, before it cuts off what is negative and rescales."""
    import pytorch_grad_cam  # noqa: PLC0415 - of the group `explanations`

    kind = {"Grad-CAM": pytorch_grad_cam.GradCAM, "HiResCAM": pytorch_grad_cam.HiResCAM}[cam]

    def explain(network: Interflow, images: Tensor, classes: Tensor) -> np.ndarray:
        layer = blocks_of(network)[point]
        with kind(Explained(network), [layer]) as method:
            targets = [_column(int(index)) for index in classes]
            method(input_tensor=images, targets=targets)
            activations, gradients = (
                found[0].numpy()
                for found in (method.activations_and_grads.activations, method.activations_and_grads.gradients)
            )
            signed = method.get_cam_image(images, layer, targets, activations, gradients, False)
        network.zero_grad(set_to_none=True)
        return spread(signed, (images.shape[-2], images.shape[-1]))

    return Method(f"{cam}, {point}", "gradient", explain)


def _column(index: int) -> Callable[[Tensor], Tensor]:
    return lambda output: output[index]


def grad_cam_by_hand(network: Interflow, images: Tensor, classes: Tensor, point: str) -> np.ndarray:
    """Grad-CAM at its cheapest, for the clock: no gradient is taken but that of the layer's own map."""
    kept: list[Tensor] = []
    handle = blocks_of(network)[point].register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    logits = network(images).logits
    handle.remove()
    chosen = (logits.gather(1, classes[:, None])[:, 0] - logits.mean(dim=1)).sum()
    (gradient,) = torch.autograd.grad(chosen, kept)
    signed = (gradient.mean(dim=(2, 3), keepdim=True) * kept[0]).sum(dim=1)
    return spread(signed.detach().numpy(), (images.shape[-2], images.shape[-1]))


def integrated_gradients() -> Method:
    """Captum's, from an image of the mean colour; summed over the channels."""
    from captum.attr import IntegratedGradients  # noqa: PLC0415 - of the group `explanations`

    def explain(network: Interflow, images: Tensor, classes: Tensor) -> np.ndarray:
        method = IntegratedGradients(Explained(network))
        found: Any = method.attribute(images, torch.zeros_like(images), classes, n_steps=STEPS, internal_batch_size=64)
        return found.sum(dim=1).detach().double().numpy()

    return Method(f"integrated gradients, {STEPS} steps", "gradient", explain)


def occlusion() -> Method:
    """What is lost as a square turns to the mean colour, one of 8 by 8 after the other."""

    def explain(network: Interflow, images: Tensor, classes: Tensor) -> np.ndarray:
        explained = Explained(network)
        rows = torch.arange(len(images))
        maps = np.empty((len(images), OCCLUDED), np.float64)
        with torch.no_grad():
            whole = explained(images)[rows, classes]
            for square in range(OCCLUDED):
                kept = torch.ones(OCCLUDED)
                kept[square] = 0
                mask = _squares(kept.view(1, 1, 8, 8), images)
                maps[:, square] = (whole - explained(images * mask)[rows, classes]).numpy()
        return _squares(torch.from_numpy(maps).view(-1, 1, 8, 8), images)[:, 0].numpy()

    return Method("occlusion, 64 squares", "occlusion", explain)


def _squares(values: Tensor, images: Tensor) -> Tensor:
    """(N, 1, 8, 8) to the images' size, without interpolation."""
    return values.repeat_interleave(images.shape[-2] // 8, 2).repeat_interleave(images.shape[-1] // 8, 3)


def of_nothing() -> list[Method]:
    """A random map, and the edges of the image: what a map has to beat to tell anything of the network."""

    def random(_network: Interflow, images: Tensor, _classes: Tensor) -> np.ndarray:
        # Drawn from the image, so that the same image always gets the same one.
        seeds = [abs(int(image.double().sum() * 1e6)) for image in images]
        size = (images.shape[-2], images.shape[-1])
        return np.stack([np.random.default_rng(seed).standard_normal(size) for seed in seeds])

    def edges(_network: Interflow, images: Tensor, _classes: Tensor) -> np.ndarray:
        grey = images.mean(dim=1).double().numpy()
        down, right = np.gradient(grey, axis=(1, 2))
        return np.hypot(down, right)

    return [Method("random", "nothing", random), Method("edges of the image", "nothing", edges)]


def by_name(methods: Sequence[Method]) -> dict[str, Method]:
    """In their order."""
    return {method.name: method for method in methods}
