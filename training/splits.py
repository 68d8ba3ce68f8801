"""Parts of a data set: images in memory, or as files that worker processes decode, and their labels."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from model.contract import InputSpec, InterflowError
from model.images import MOST_PIXELS, ImageError, read_input

SPLIT_SEED = 0
"""Of what is held out. Fixed, so that runs with other seeds compare."""


def read_file(path: Path, spec: InputSpec) -> np.ndarray:
    """An image file as uint8 (height, width, channels), however many pixels it has; an ImageError names the file."""
    try:
        return read_input(path, spec, MOST_PIXELS)
    except (ImageError, OSError) as error:
        raise ImageError(f"{path}: {error}") from error


class FolderImages(Dataset[np.ndarray]):
    """Image files, decoded and resized when they are asked for, many at a time."""

    def __init__(self, paths: Sequence[Path], spec: InputSpec) -> None:
        self.paths = paths
        self.spec = spec

    def __len__(self) -> int:
        return len(self.paths)

    def __getitems__(self, indices: Sequence[int]) -> np.ndarray | InterflowError:
        """uint8 (n, height, width, channels), or what went wrong: a worker's exceptions arrive as pages of text."""
        try:
            images = [read_file(self.paths[i], self.spec) for i in indices]
        except InterflowError as error:
            return error
        shape = (len(images), self.spec.height, self.spec.width, self.spec.channels)
        return np.stack(images) if images else np.empty(shape, np.uint8)  # a process's share of a small batch


@dataclass(frozen=True)
class Split:
    """Images, as one uint8 tensor (M, height, width, channels) or as files, and their class indices (M,)."""

    images: Tensor | FolderImages
    labels: Tensor
    paths: Sequence[Path] | None = None
    """The images' files, also of those in memory; None of a set that has none."""

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, order: Sequence[Tensor], workers: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels for each tensor of indices in `order`; files are read ahead by `workers` processes."""
        if isinstance(self.images, Tensor):
            for indices in order:
                yield self.images[indices], self.labels[indices]
        else:
            for images, indices in zip(fetch(self.images, order, workers), order, strict=True):
                yield torch.from_numpy(images), self.labels[indices]

    def in_order(self, batch_size: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image once, in order."""
        return self.batches(torch.arange(len(self)).split(batch_size), workers)

    def to(self, device: torch.device) -> "Split":
        """Images in memory on that device; files, and the labels, stay where they are."""
        return replace(self, images=self.images.to(device)) if isinstance(self.images, Tensor) else self

    def subset(self, indices: Tensor) -> "Split":
        """These images only."""
        paths = None if self.paths is None else [self.paths[i] for i in indices.tolist()]
        if isinstance(self.images, Tensor):
            return Split(self.images[indices], self.labels[indices], paths)
        files = [self.images.paths[i] for i in indices.tolist()]
        return Split(FolderImages(files, self.images.spec), self.labels[indices], paths)


def stratified(labels: Tensor, classes: tuple[str, ...], fraction: float) -> tuple[Tensor, Tensor]:
    """Split indices in two, holding out `fraction` of each class: at least one image of it, and never all."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    kept, held = [], []
    for label, name in enumerate(classes):
        members = (labels == label).nonzero().flatten()
        if len(members) < (2 if fraction else 1):
            raise InterflowError(
                f"class {name} is down to {len(members)} readable images, and some are to be held out; it takes 2. "
                f"Add images, or bring a test folder and give --val-fraction 0."
            )
        members = members[torch.randperm(len(members), generator=generator)]
        cut = min(max(1, round(fraction * len(members))), len(members) - 1) if fraction else 0
        held.append(members[:cut])
        kept.append(members[cut:])
    return torch.cat(kept).sort().values, torch.cat(held).sort().values


def fetch(source: Dataset[Any], order: Sequence[Tensor], workers: int) -> Iterator[Any]:
    """Items of a data set through `workers` processes, for each tensor of indices in `order`.

    What the data set returns should be numpy arrays: tensors would come through shared memory, which is small in a
    container, with an open file each.

    Raises:
        InterflowError: what the data set returned in the place of items; or a worker was killed.
    """
    loader = DataLoader(
        source,
        batch_sampler=[indices.tolist() for indices in order],
        num_workers=min(workers, len(order)),
        collate_fn=_as_it_is,
        worker_init_fn=_leave_the_process_group,
        generator=torch.Generator(),  # or it would draw from torch's own, and a resumed run would differ
    )
    batches = iter(loader)
    for _ in order:
        try:
            items = next(batches)
        except RuntimeError as error:  # of torch: a worker died
            raise InterflowError(
                f"a process that reads images has died ({error}); is there too little memory?"
            ) from error
        if isinstance(items, InterflowError):
            raise items
        yield items


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_the_process_group(_worker: int) -> None:
    if hasattr(os, "setsid"):  # Ctrl-C reaches a whole group, and is for the parent, which stops in good order
        os.setsid()
