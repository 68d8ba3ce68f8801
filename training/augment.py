"""Random changes to a batch of images, drawn for each image by itself.

Batches are uint8 (N, height, width, channels); the generator alone decides, so a step can be repeated exactly.
"""

import torch
from torch import Generator, Tensor
from torch.nn import functional

from training.recipe import Recipe


def augment(images: Tensor, recipe: Recipe, generator: Generator) -> Tensor:
    """Crop, mirror and invert as the recipe says."""
    if recipe.crop_padding:
        images = random_crop(images, recipe.crop_padding, generator)
    if recipe.flip:
        images = torch.where(_chosen(len(images), recipe.flip, generator), images.flip(2), images)
    if recipe.invert:
        images = torch.where(_chosen(len(images), recipe.invert, generator), 255 - images, images)
    return images


def random_crop(images: Tensor, padding: int, generator: Generator) -> Tensor:
    """Pad with zeros on all sides, then cut the original size out at a random place."""
    count, height, width, _ = images.shape
    padded = functional.pad(images, (0, 0, padding, padding, padding, padding))
    top, left = torch.randint(2 * padding + 1, (2, count, 1), generator=generator)
    rows = top + torch.arange(height)
    columns = left + torch.arange(width)
    return padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def _chosen(count: int, probability: float, generator: Generator) -> Tensor:
    return (torch.rand(count, generator=generator) < probability)[:, None, None, None]
