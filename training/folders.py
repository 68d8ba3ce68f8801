"""Folders of class folders. Every image is decoded once before training: a damaged one is found at the start."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from model.contract import InputSpec, InterflowError
from model.images import ImageError
from training.cache import Decoded, DecodedCache
from training.recipe import Recipe
from training.splits import FolderImages, Split, fetch, read_file, stratified

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
TRAIN, TEST = "train", ("test", "val", "valid", "validation")
HELD_OUT_TEST = 0.2
"""Of a set that brings no test split."""

IN_MEMORY_BYTES = 2**30
"""A larger set is decoded anew each epoch, by worker processes. (While a set is split there are two copies of it.)"""


@dataclass(frozen=True)
class FoundSet:
    """What a source holds.

    Attributes:
        classes: names, by index.
        train: every class in it has images, as in `test`.
        test: touched once, at the end.
        digest: of all pixels and labels.
        skipped: images that could not be read, and that the recipe allowed to leave out.
    """

    classes: tuple[str, ...]
    train: Split
    test: Split
    digest: str
    skipped: int = 0


def read_folder(root: Path, spec: InputSpec, recipe: Recipe) -> FoundSet:
    """Read a folder in ImageFolder layout: `<class>/` folders, or these below `train/` and `test/` (or `val/`).

    Without a test folder, a fixed, stratified fifth is held out for test.

    Raises:
        InterflowError: no folder, fewer than two classes, a class without images, other classes in test than in train,
            `train/` and `test/` without class folders in them, or images that cannot be read (named), unless the recipe
            skips them.
    """
    if not root.is_dir():
        raise InterflowError(
            f"{root}: no such folder. Give --data the name of a set (see --help), or a folder that holds one folder "
            f"of images for each class."
        )
    has_splits = (root / TRAIN).is_dir() and any(path.is_dir() for path in (root / TRAIN).iterdir())
    classes, paths, labels = _list_images(root / TRAIN if has_splits else root)
    if not has_splits and set(classes) <= {TRAIN, *TEST}:
        raise InterflowError(
            f"{root}: has {' and '.join(f'{name}/' for name in classes)} but no class folders in them; expected one "
            f"folder of images for each class in both."
        )
    test_root = next((root / name for name in TEST if has_splits and (root / name).is_dir()), None)
    if test_root and test_root.name == TEST[0] and any((root / name).is_dir() for name in TEST[1:]):
        print(f"note: {root} has a validation folder beside {test_root.name}/; it is not used.")
    if test_root is None:
        whole, digest, skipped = _decode(root, paths, labels, spec, recipe)
        kept, held = stratified(whole.labels, classes, HELD_OUT_TEST)
        return FoundSet(classes, whole.subset(kept), whole.subset(held), digest, skipped)
    test_classes, test_paths, test_labels = _list_images(test_root)
    if classes != test_classes:
        odd = ", ".join(sorted(set(classes) ^ set(test_classes)))
        raise InterflowError(
            f"{root}: {TRAIN} and {test_root.name} have different classes: only one of them has {odd}. "
            f"Both need the same folders."
        )
    train, digest, skipped = _decode(root / TRAIN, paths, labels, spec, recipe)
    test, test_digest, test_skipped = _decode(test_root, test_paths, test_labels, spec, recipe)
    return FoundSet(classes, train, test, digest + test_digest, skipped + test_skipped)


def _list_images(root: Path) -> tuple[tuple[str, ...], list[Path], list[int]]:
    classes = tuple(sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")))
    unreadable = [name for name in classes if not name.isprintable()]
    if unreadable:
        raise InterflowError(f"{root}: class folder {unreadable[0]!r} has a name that cannot be shown; rename it.")
    if len(classes) < 2:
        found = f"the one class {classes[0]}" if classes else "no class folders"
        raise InterflowError(f"{root}: found {found}; expected one folder of images for each of two or more classes.")
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        of_class = sorted(path for path in (root / name).rglob("*") if _is_image_file(path))
        if not of_class:
            raise InterflowError(f"{root / name}: no images; expected files ending in {', '.join(sorted(SUFFIXES))}.")
        paths += of_class
        labels += [label] * len(of_class)
    return classes, paths, labels


def _is_image_file(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _decode(
    root: Path, paths: list[Path], labels: list[int], spec: InputSpec, recipe: Recipe
) -> tuple[Split, str, int]:
    """Decode all files; returns what can be read (in memory where it fits), its digest, and how many cannot."""
    keep = len(paths) * spec.height * spec.width * spec.channels <= IN_MEMORY_BYTES
    cache = DecodedCache(recipe.data_dir, root, paths, spec) if keep and recipe.cache else None
    if cache and (decoded := cache.load()):
        return Split(decoded.images, torch.tensor(labels), paths), decoded.digest, 0
    order = torch.arange(len(paths)).split(64)
    good, images, damaged = [], [], []
    digest = hashlib.sha256()
    with tqdm(total=len(paths), desc=f"reading {paths[0].parent.parent}", unit="image", disable=None) as bar:
        batches = fetch(_Checked(paths, spec, keep), order, recipe.workers)
        for (batch, errors, batch_digest), indices in zip(batches, order, strict=True):
            images.append(torch.from_numpy(batch))
            digest.update(batch_digest)
            damaged += errors.values()
            good += [i for position, i in enumerate(indices.tolist()) if position not in errors]
            bar.update(len(indices))
    if damaged and not recipe.skip_bad_images:
        raise InterflowError(
            f"{damaged[0]} {len(damaged)} of {len(paths)} images cannot be read; "
            f"remove or repair them, or give --skip-bad-images."
        )
    if damaged:
        print(f"left out {len(damaged)} of {len(paths)} images; the first: {damaged[0]}")
    good_paths = [paths[i] for i in good]
    kept = torch.cat(images) if keep else FolderImages(good_paths, spec)
    kept_labels = torch.tensor(labels)[good]
    digest.update(kept_labels.numpy().tobytes())
    if cache and isinstance(kept, torch.Tensor) and not damaged:
        cache.save(Decoded(kept, digest.hexdigest()))
    return Split(kept, kept_labels, good_paths), digest.hexdigest(), len(damaged)


class _Checked(Dataset[tuple[np.ndarray, dict[int, str], bytes]]):
    """Images of files, the positions and reasons of those that could not be decoded, and a digest of the others."""

    def __init__(self, paths: list[Path], spec: InputSpec, keep: bool) -> None:
        self.paths, self.spec, self.keep = paths, spec, keep

    def __getitems__(self, indices: Sequence[int]) -> tuple[np.ndarray, dict[int, str], bytes]:
        images, errors = [], {}
        for position, index in enumerate(indices):
            try:
                images.append(read_file(self.paths[index], self.spec))
            except ImageError as error:
                errors[position] = str(error)
        shape = (len(images), self.spec.height, self.spec.width, self.spec.channels)
        batch = np.stack(images) if images else np.empty(shape, np.uint8)
        digest = hashlib.sha256(batch.tobytes()).digest()
        return batch if self.keep else batch[:0], errors, digest
