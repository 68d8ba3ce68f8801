"""How good a heat map is: faithful to the network, sensitive to its weights, in the right place, steady.

Maps are signed arrays (N, height, width), high where the image speaks for the class. Nothing here knows how they came
about: all methods get the same images, the same patches, the same perturbation.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

Answer = Callable[[Tensor], np.ndarray]
"""Images (N, channels, height, width), whose mean colour is 0, to (N,): how sure the network is of the class."""

Explain = Callable[[Tensor], np.ndarray]
"""Images to maps (N, height, width) of the class explained."""


class Curves(NamedTuple):
    """How sure the network stays as patches go, (N, points) each, from the whole image to none of it."""

    most_first: np.ndarray
    least_first: np.ndarray

    def deletion(self) -> np.ndarray:
        """(N,): area under `most_first`, 0..1. Lower is better."""
        return _area(self.most_first)

    def insertion(self) -> np.ndarray:
        """(N,): area as patches come, the most relevant first. What is there then is what `least_first` left."""
        return _area(self.least_first)

    def srg(self) -> np.ndarray:
        """(N,): symmetric relevance gain, insertion less deletion: 0 for a random map, whatever the perturbation."""
        return self.insertion() - self.deletion()


def _area(curves: np.ndarray) -> np.ndarray:
    return (curves[:, :-1] + curves[:, 1:]).mean(axis=1) / 2


def patch_scores(maps: np.ndarray, patch: int) -> np.ndarray:
    """Sums over square patches: (N, height, width) to (N, rows, columns); the sides are multiples of `patch`."""
    n, height, width = maps.shape
    return maps.reshape(n, height // patch, patch, width // patch, patch).sum(axis=(2, 4))


def removal_curves(answer: Answer, images: Tensor, maps: np.ndarray, *, patch: int, step: int) -> Curves:
    """Set patches to the mean colour, `step` at a time, by a map's order and by its reverse.

    Args:
        answer: the network.
        images: (N, channels, height, width), 0 where a pixel has the mean colour.
        maps: (N, height, width).
        patch: side in pixels; divides height and width.
        step: patches that go at a time; divides their number.
    """
    scores = patch_scores(maps, patch)
    n, rows, columns = scores.shape
    order = np.argsort(-scores.reshape(n, -1), axis=1, kind="stable")

    whole, none = answer(images), answer(torch.zeros_like(images))

    def curve(order: np.ndarray) -> np.ndarray:
        position = np.argsort(order, axis=1).reshape(n, 1, rows, columns)  # when each patch goes
        points = [whole]
        for gone in range(step, rows * columns, step):
            kept = torch.from_numpy(position >= gone).to(images.dtype)
            points.append(answer(images * kept.repeat_interleave(patch, 2).repeat_interleave(patch, 3)))
        return np.stack([*points, none], axis=1)

    return Curves(curve(order), curve(order[:, ::-1]))


def map_distance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """1 - Spearman's rank correlation of each pair of maps: (N, ...) twice to (N,) in 0..2; 0: the same order."""
    ranks = [rankdata(maps.reshape(len(maps), -1), axis=1) for maps in (first, second)]
    centred = [rank - rank.mean(axis=1, keepdims=True) for rank in ranks]
    scale = np.sqrt(np.prod([(rank**2).sum(axis=1) for rank in centred], axis=0))
    product = (centred[0] * centred[1]).sum(axis=1)
    return 1 - np.divide(product, scale, out=np.zeros_like(product), where=scale > 0)


def shift_similarity(explain: Explain, images: Tensor, *, patch: int) -> np.ndarray:
    """How alike the maps of an image and of the same image moved by a pixel are, moved back: (N,), rank correlation.

    The mean over moves down and to the right; the edge moves in again. Compared by patches that lie a patch or more
    inside the image.
    """
    still = explain(images)
    found = []
    for axis in (-2, -1):
        moved = torch.roll(images, 1, dims=axis)
        moved.select(axis, 0).copy_(images.select(axis, 0))
        back = np.roll(explain(moved), -1, axis=axis)
        inner = [patch_scores(maps[:, patch:-patch, patch:-patch], patch) for maps in (still, back)]
        found.append(1 - map_distance(*inner))
    return np.mean(found, axis=0)


def draw_mosaics(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Indices (count, 4) of images of four different classes each; quadrants by row, no image used twice.

    Raises:
        ValueError: too few images of too few classes.
    """
    generator = np.random.default_rng(seed)
    left = {label: list(generator.permutation(np.flatnonzero(labels == label))) for label in np.unique(labels)}
    drawn: list[list[int]] = []
    for _ in range(count):
        # Of the four classes that most images are left of: then the images suffice as long as they can.
        most = sorted(left, key=lambda label: (len(left[label]), generator.random()), reverse=True)[:4]
        if len(most) < 4 or not left[most[-1]]:
            raise ValueError(f"{len(labels)} images give {len(drawn)} mosaics of four classes, not {count}")
        drawn.append([left[label].pop() for label in generator.permutation(most)])
    return np.array(drawn)


def build_mosaics(images: Tensor, indices: np.ndarray) -> Tensor:
    """(M, 4) indices to images of twice the side: quadrant 0 top left, 1 top right, 2 bottom left, 3 bottom right."""
    parts = images[torch.from_numpy(indices)]
    top, bottom = (torch.cat([parts[:, i], parts[:, i + 1]], dim=-1) for i in (0, 2))
    return torch.cat([top, bottom], dim=-2)


def _quadrants(maps: np.ndarray) -> np.ndarray:
    """(N, 2S, 2S) to (N, 4, S * S)."""
    n, height, width = maps.shape
    parts = maps.reshape(n, 2, height // 2, 2, width // 2).transpose(0, 1, 3, 2, 4)
    return parts.reshape(n, 4, -1)


def share_inside(maps: np.ndarray, quadrants: Sequence[int] | np.ndarray) -> np.ndarray:
    """Share of a map's positive values that lies in the quadrant of its class: (N,), 0..1; 0 where none is positive."""
    found = np.maximum(_quadrants(maps), 0).sum(axis=2)
    inside, total = found[np.arange(len(maps)), quadrants], found.sum(axis=1)
    return np.divide(inside, total, out=np.zeros_like(total), where=total > 0)


def points_inside(maps: np.ndarray, quadrants: Sequence[int] | np.ndarray) -> np.ndarray:
    """The pointing game: 1 where a map's highest value lies in the quadrant of its class, else 0; (N,)."""
    return (_quadrants(maps).max(axis=2).argmax(axis=1) == np.asarray(quadrants)).astype(float)


class Interval(NamedTuple):
    """A mean over images, and the 95 % interval of it."""

    mean: float
    low: float
    high: float


def bootstrap(values: np.ndarray, draws: int = 2000, seed: int = 0) -> Interval:
    """Mean of (N, ...) values with its percentile bootstrap over N: what belongs to one image stays together."""
    rows = values.reshape(len(values), -1).mean(axis=1)
    drawn = np.random.default_rng(seed).integers(len(rows), size=(draws, len(rows)))
    low, high = np.percentile(rows[drawn].mean(axis=1), [2.5, 97.5])
    return Interval(float(rows.mean()), float(low), float(high))
