"""Folders of class folders. Every image is decoded once before training: a damaged one is found at the start."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from model.contract import InputSpec, InterflowError
from model.images import ImageError, read_input
from training.recipe import Recipe
from training.splits import FolderImages, Split, fetch, stratified

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
TRAIN, TEST = "train", ("test", "val", "valid", "validation")
HELD_OUT_TEST = 0.2
"""Of a set that brings no test split."""

IN_MEMORY_BYTES = 2 * 2**30
"""A larger set is decoded anew each epoch, by worker processes."""


@dataclass(frozen=True)
class FoundSet:
    """What a source holds; `skipped` images could not be read, and the recipe allowed to leave them out."""

    classes: tuple[str, ...]
    train: Split
    test: Split
    skipped: int = 0


def read_folder(root: Path, spec: InputSpec, recipe: Recipe) -> FoundSet:
    """Read a folder in ImageFolder layout: `<class>/` folders, or these below `train/` and `test/` (or `val/`).

    Without a test folder, a fixed, stratified fifth is held out for test.

    Raises:
        InterflowError: no folder, fewer than two classes, a class without images, other classes in test than in train,
            or images that cannot be read (named), unless the recipe skips them.
    """
    if not root.is_dir():
        raise InterflowError(
            f"{root}: no such folder. Give --data the name of a set (see --help), or a folder that holds one folder "
            f"of images for each class."
        )
    has_splits = (root / TRAIN).is_dir()
    classes, paths, labels = _list_images(root / TRAIN if has_splits else root)
    test_root = next((root / name for name in TEST if has_splits and (root / name).is_dir()), None)
    if test_root is None:
        whole, skipped = _decode(paths, labels, spec, recipe)
        kept, held = stratified(whole.labels, classes, HELD_OUT_TEST)
        return FoundSet(classes, whole.subset(kept), whole.subset(held), skipped)
    test_classes, test_paths, test_labels = _list_images(test_root)
    if classes != test_classes:
        odd = ", ".join(sorted(set(classes) ^ set(test_classes)))
        raise InterflowError(
            f"{root}: {TRAIN} and {test_root.name} have different classes: only one of them has {odd}. "
            f"Both need the same folders."
        )
    train, skipped = _decode(paths, labels, spec, recipe)
    test, skipped_of_test = _decode(test_paths, test_labels, spec, recipe)
    return FoundSet(classes, train, test, skipped + skipped_of_test)


def _list_images(root: Path) -> tuple[tuple[str, ...], list[Path], list[int]]:
    classes = tuple(sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")))
    if len(classes) < 2:
        found = f"the one class {classes[0]}" if classes else "no class folders"
        raise InterflowError(f"{root}: found {found}; expected one folder of images for each of two or more classes.")
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        of_class = sorted(path for path in (root / name).rglob("*") if path.suffix.lower() in SUFFIXES)
        if not of_class:
            raise InterflowError(f"{root / name}: no images; expected files ending in {', '.join(sorted(SUFFIXES))}.")
        paths += of_class
        labels += [label] * len(of_class)
    return classes, paths, labels


def _decode(paths: list[Path], labels: list[int], spec: InputSpec, recipe: Recipe) -> tuple[Split, int]:
    """Decode all files; returns what can be read, in memory where it fits, and how many cannot."""
    keep = len(paths) * spec.height * spec.width * spec.channels <= IN_MEMORY_BYTES
    order = torch.arange(len(paths)).split(64)
    good, images, damaged = [], [], []
    with tqdm(total=len(paths), desc=f"reading {paths[0].parent.parent}", unit="image", disable=None) as bar:
        batches = fetch(_Checked(paths, spec, keep), order, recipe.workers)
        for (batch, errors), indices in zip(batches, order, strict=True):
            images.append(batch)
            damaged += errors.values()
            good += [i for position, i in enumerate(indices.tolist()) if position not in errors]
            bar.update(len(indices))
    if damaged and not recipe.skip_bad_images:
        raise InterflowError(
            f"{damaged[0]} {len(damaged)} of {len(paths)} images cannot be read; "
            f"remove or mend them, or give --skip-bad-images."
        )
    if damaged:
        print(f"left out {len(damaged)} of {len(paths)} images; the first: {damaged[0]}")
    kept = torch.cat(images) if keep else FolderImages([paths[i] for i in good], spec)
    return Split(kept, torch.tensor(labels)[good]), len(damaged)


class _Checked(Dataset[tuple[Tensor, dict[int, str]]]):
    """Images of files, with the positions and reasons of those that could not be decoded."""

    def __init__(self, paths: list[Path], spec: InputSpec, keep: bool) -> None:
        self.paths, self.spec, self.keep = paths, spec, keep

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, dict[int, str]]:
        images, errors = [], {}
        for position, index in enumerate(indices):
            try:
                images.append(read_input(self.paths[index], self.spec))
            except (ImageError, OSError) as error:
                errors[position] = f"{self.paths[index]}: {error}"
        shape = (len(images) if self.keep else 0, self.spec.height, self.spec.width, self.spec.channels)
        return torch.from_numpy(np.stack(images) if shape[0] else np.empty(shape, np.uint8)), errors
