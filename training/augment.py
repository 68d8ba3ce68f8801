"""Everything random in an epoch, drawn before it begins: the order of the images and what is done to each.

Drawn on the CPU from the seed and the epoch's number alone, so that a run does not depend on where its images lie, on
the device, or on having been resumed. Batches are uint8 (N, height, width, channels).
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from training.recipe import Recipe


class Draws(NamedTuple):
    """What was drawn for N images, each int64 (N,)."""

    image: Tensor
    """Which image of the training split."""
    top: Tensor
    """Of the crop, in the padded image: 0 to twice the padding."""
    left: Tensor
    mirrored: Tensor
    """0 or 1."""
    inverted: Tensor
    """0 or 1."""
    hole_row: Tensor
    """Centre of what is cut out, in pixels of the image."""
    hole_column: Tensor


def draw_epoch(labels: Tensor, size: tuple[int, int], recipe: Recipe, epoch: int) -> Tensor:
    """Draw an epoch: each image once, or, with the recipe's balanced sampler, each class as often as any other.

    Args:
        labels: (M,) class indices of the training images.
        size: height and width of the images.
        recipe: seed, and what is done to the images.
        epoch: counted from 0.

    Returns:
        (M, fields of `Draws`), in the order of training.
    """
    seed = np.random.SeedSequence([recipe.seed, epoch]).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(seed[0]))
    count = len(labels)

    def integers(below: int) -> Tensor:
        return torch.randint(below, (count,), generator=generator)

    def chosen(probability: float) -> Tensor:
        return (torch.rand(count, generator=generator) < probability).long()

    if recipe.balance == "sampler":
        rarity = 1 / labels.bincount().double()
        image = torch.multinomial(rarity[labels], count, replacement=True, generator=generator)
    else:
        image = torch.randperm(count, generator=generator)
    places = 2 * recipe.crop_padding + 1
    return torch.stack(
        Draws(
            image=image,
            top=integers(places),
            left=integers(places),
            mirrored=chosen(recipe.flip),
            inverted=chosen(recipe.invert),
            hole_row=integers(size[0]),
            hole_column=integers(size[1]),
        ),
        dim=1,
    )


def augment(images: Tensor, draws: Draws, recipe: Recipe, fill: Tensor) -> Tensor:
    """Crop, mirror, invert and cut out, as the recipe says and as it was drawn.

    Args:
        images: uint8 (N, height, width, channels), on any device.
        draws: for these N images, on the same device.
        recipe: what is done.
        fill: uint8 (channels,), the colour of what is cut out.

    Returns:
        As `images`.
    """
    if recipe.crop_padding:
        images = crop(images, recipe.crop_padding, draws.top, draws.left)
    if recipe.flip:
        images = torch.where(_per_image(draws.mirrored), images.flip(2), images)
    if recipe.invert:
        images = torch.where(_per_image(draws.inverted), 255 - images, images)
    if recipe.cutout:
        _, height, width, _ = images.shape
        rows = _within(draws.hole_row, height, recipe.cutout)
        columns = _within(draws.hole_column, width, recipe.cutout)
        images = torch.where((rows[:, :, None] & columns[:, None, :])[..., None], fill, images)
    return images


def crop(images: Tensor, padding: int, top: Tensor, left: Tensor) -> Tensor:
    """Pad with zeros on all sides, then cut the original size out at the given places (N,)."""
    count, height, width, _ = images.shape
    padded = functional.pad(images, (0, 0, padding, padding, padding, padding))
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + torch.arange(width, device=images.device)
    which = torch.arange(count, device=images.device)
    return padded[which[:, None, None], rows[:, :, None], columns[:, None, :]]


def _per_image(flags: Tensor) -> Tensor:
    return flags.bool()[:, None, None, None]


def _within(centres: Tensor, size: int, side: int) -> Tensor:
    """(N, size): which of `size` positions lie in a hole of `side` around each centre; it may reach over the edge."""
    offsets = torch.arange(size, device=centres.device) - centres[:, None] + side // 2
    return (offsets >= 0) & (offsets < side)
