"""Image sets: named ones, scikit-learn's digits, or any folder of class folders; decoded once, or on the fly.

Every image comes through `model/images.py`, as it does in the server.
"""

import hashlib
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from model.contract import InputSpec, InterflowError
from model.images import ImageError, read_input, to_input
from training.recipe import Recipe

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
TRAIN, TEST, VALIDATION = "train", "test", ("val", "valid", "validation")
FOLDER_SIZE, FOLDER_CHANNELS = 64, 3
IN_MEMORY_BYTES = 2 * 2**30
"""A larger set is decoded anew each epoch, by worker processes."""

HELD_OUT_TEST = 0.2
"""Of a set that brings no test split. Fixed, as is the seed below, so that runs with other seeds compare."""
SPLIT_SEED = 0


class NamedSet(NamedTuple):
    """A public data set: its class in torchvision, its own size, and names where its folders are only numbered."""

    torchvision: str
    size: int
    channels: int
    classes: tuple[str, ...] | None = None


_DIGIT_NAMES = tuple("0123456789")
_CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_KMNIST_NAMES = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
_FASHION_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
NAMED_SETS = {
    "cifar10": NamedSet("CIFAR10", 32, 3, _CIFAR10_NAMES),
    "cifar100": NamedSet("CIFAR100", 32, 3),
    "svhn": NamedSet("SVHN", 32, 3, _DIGIT_NAMES),
    "mnist": NamedSet("MNIST", 28, 1, _DIGIT_NAMES),
    "kmnist": NamedSet("KMNIST", 28, 1, _KMNIST_NAMES),
    "fashion_mnist": NamedSet("FashionMNIST", 28, 1, _FASHION_NAMES),
}


class FolderImages(Dataset[Tensor]):
    """Image files, decoded and resized when they are asked for, many at a time."""

    def __init__(self, paths: Sequence[Path], spec: InputSpec) -> None:
        self.paths = paths
        self.spec = spec

    def __len__(self) -> int:
        return len(self.paths)

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        """uint8 (n, height, width, channels)."""
        return torch.from_numpy(np.stack([read_input(self.paths[i], self.spec) for i in indices]))


@dataclass(frozen=True)
class Split:
    """Images, as one uint8 tensor (M, height, width, channels) or as files, and their class indices (M,)."""

    images: Tensor | FolderImages
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, order: Sequence[Tensor], workers: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels for each tensor of indices in `order`; files are read ahead by `workers` processes."""
        for images, indices in zip(_fetch(self.images, order, workers), order, strict=True):
            yield images, self.labels[indices]

    def in_order(self, batch_size: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image once, in order."""
        return self.batches(torch.arange(len(self)).split(batch_size), workers)

    def subset(self, indices: Tensor) -> "Split":
        """These images only."""
        if isinstance(self.images, Tensor):
            return Split(self.images[indices], self.labels[indices])
        paths = [self.images.paths[i] for i in indices.tolist()]
        return Split(FolderImages(paths, self.images.spec), self.labels[indices])


@dataclass(frozen=True)
class ImageData:
    """A data set ready to train on."""

    name: str
    classes: tuple[str, ...]
    spec: InputSpec
    train: Split
    val: Split | None
    test: Split
    skipped: int
    """Images that could not be read and were left out, as the recipe allowed."""
    fingerprint: str
    """Changes with any image, label or file name: a resumed run must see what it saw before."""


def load_data(recipe: Recipe) -> ImageData:
    """Load a recipe's data set, splitting off what is held out.

    Raises:
        InterflowError: nothing there, no images, one class, classes that differ between the splits, damaged images
            (unless the recipe skips them), or too few to hold some out; names the place.
    """
    reader = _Reader(recipe)
    if recipe.data == "digits":
        spec = reader.spec(size=8, channels=1)
        name, classes, (train, test) = "digits", _DIGIT_NAMES, _digits(spec)
    elif recipe.data in NAMED_SETS:
        named = NAMED_SETS[recipe.data]
        spec = reader.spec(named.size, named.channels)
        root = recipe.data_dir / recipe.data
        if (root / TRAIN).is_dir() and (root / TEST).is_dir():
            classes, train, test = reader.folder(root, spec)
            if named.classes and len(classes) == len(named.classes) and set(classes) <= set(_DIGIT_NAMES):
                classes = named.classes
        else:
            classes, train, test = _download(recipe.data, named, recipe.data_dir, spec)
        name = recipe.data
    else:
        root = Path(recipe.data)
        spec = reader.spec(FOLDER_SIZE, FOLDER_CHANNELS)
        classes, train, test = reader.folder(root, spec)
        name = "".join(c if c.isalnum() or c in "._-" else "-" for c in root.resolve().name).lstrip("._-") or "images"

    fingerprint = _fingerprint(classes, train, test)
    kept, held = _stratified(train.labels, classes, recipe.val_fraction)
    val = train.subset(held) if len(held) else None
    train = train.subset(kept)
    mean, std = reader.statistics(train)
    spec = spec.model_copy(update={"mean": mean, "std": std})
    return ImageData(name, classes, spec, train, val, test, reader.skipped, fingerprint)


class _Reader:
    """Reads folders once: finds what is damaged, keeps what fits in memory, and gathers the pixels' statistics."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.skipped = 0

    def spec(self, size: int, channels: int) -> InputSpec:
        """The input before the training images' mean and deviation are known."""
        side, channels = self.recipe.image_size or size, self.recipe.channels or channels
        neutral = {"mean": (0.0,) * channels, "std": (1.0,) * channels}
        return InputSpec.model_validate(
            {"height": side, "width": side, "channels": channels, "resize": self.recipe.resize, **neutral}
        )

    def folder(self, root: Path, spec: InputSpec) -> tuple[tuple[str, ...], Split, Split]:
        """Classes, train and test of a folder in ImageFolder layout, with or without splits."""
        if not root.is_dir():
            raise InterflowError(
                f"{root}: no such folder. Give --data a name ({', '.join(['digits', *NAMED_SETS])}) "
                f"or a folder that holds one folder of images a class."
            )
        split_up = (root / TRAIN).is_dir()
        classes, paths, labels = _list_images(root / TRAIN if split_up else root)
        test_root = next((root / name for name in (TEST, *VALIDATION) if split_up and (root / name).is_dir()), None)
        if test_root is None:
            train = self._decode(paths, labels, spec)
            kept, held = _stratified(train.labels, classes, HELD_OUT_TEST)
            return classes, train.subset(kept), train.subset(held)
        test_classes, test_paths, test_labels = _list_images(test_root)
        if classes != test_classes:
            odd = sorted(set(classes) ^ set(test_classes))
            raise InterflowError(
                f"{root}: {TRAIN} and {test_root.name} have different classes: only one of them has {', '.join(odd)}. "
                f"Both need the same folders."
            )
        return classes, self._decode(paths, labels, spec), self._decode(test_paths, test_labels, spec)

    def _decode(self, paths: list[Path], labels: list[int], spec: InputSpec) -> Split:
        keep = len(paths) * spec.height * spec.width * spec.channels <= IN_MEMORY_BYTES
        batches = torch.arange(len(paths)).split(64)
        good, images, damaged = [], [], []
        with tqdm(total=len(paths), desc=f"reading {paths[0].parent.parent}", unit="image", disable=None) as bar:
            for (batch, errors), indices in zip(
                _fetch(_Checked(paths, spec, keep), batches, self.recipe.workers), batches, strict=True
            ):
                images.append(batch)
                damaged += errors.values()
                good += [i for position, i in enumerate(indices.tolist()) if position not in errors]
                bar.update(len(indices))
        if damaged and not self.recipe.skip_bad_images:
            raise InterflowError(
                f"{damaged[0]} {len(damaged)} of {len(paths)} images cannot be read; "
                f"remove or mend them, or give --skip-bad-images."
            )
        if damaged:
            print(f"left out {len(damaged)} of {len(paths)} images; the first: {damaged[0]}")
            self.skipped += len(damaged)
        kept_labels = torch.tensor(labels)[good]
        if keep:
            return Split(torch.cat(images), kept_labels)
        return Split(FolderImages([paths[i] for i in good], spec), kept_labels)

    def statistics(self, split: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Per-channel mean and deviation of a split's pixels, scaled to 0..1."""
        total = square = torch.zeros(1, dtype=torch.float64)
        for images, _ in split.in_order(512, self.recipe.workers):
            pixels = images.to(torch.float64).flatten(0, 2) / 255
            total = total + pixels.sum(0)
            square = square + pixels.square().sum(0)
            count_of_one = images.shape[1] * images.shape[2]
        count = len(split) * count_of_one
        mean = total / count
        std = (square / count - mean.square()).clamp_min(0).sqrt()
        if not std.gt(1e-4).all():
            raise InterflowError("the training images are all of one colour; there is nothing to learn from.")
        return tuple(mean.tolist()), tuple(std.tolist())


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


def _fetch(source: Any, order: Sequence[Tensor], workers: int) -> Iterator[Any]:
    """Items of a tensor, or of a data set through worker processes, for each tensor of indices."""
    if isinstance(source, Tensor):
        return (source[indices] for indices in order)
    loader = DataLoader(
        source,
        batch_sampler=[indices.tolist() for indices in order],
        num_workers=min(workers, len(order)),
        collate_fn=_as_it_is,
        worker_init_fn=_leave_ctrl_c_to_the_parent,
        generator=torch.Generator(),  # or it would draw from torch's own, and a resumed run would differ
    )
    return iter(loader)


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_ctrl_c_to_the_parent(_worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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


def _digits(spec: InputSpec) -> tuple[Split, Split]:
    """scikit-learn's 1,797 scans of handwritten digits, 8x8 pixels of 17 greys, a fixed fifth of them for test."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 - takes seconds, and only the digits need it

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    whole = _from_arrays(pixels, digits.target, spec)
    kept, held = _stratified(whole.labels, _DIGIT_NAMES, HELD_OUT_TEST)
    return whole.subset(kept), whole.subset(held)


def _download(name: str, named: NamedSet, data_dir: Path, spec: InputSpec) -> tuple[tuple[str, ...], Split, Split]:
    """A named set through torchvision, which keeps its own copy below `data_dir`."""
    from torchvision import datasets  # noqa: PLC0415 - takes seconds, and only a download needs it

    splits = []
    for part in (TRAIN, TEST):
        which = {"split": part} if name == "svhn" else {"train": part == TRAIN}
        try:
            part_set = getattr(datasets, named.torchvision)(data_dir, download=True, **which)
        except (OSError, RuntimeError) as error:
            raise InterflowError(
                f"{name} is not in {data_dir / name}, and downloading it failed ({error}). Unpack it as "
                f"{data_dir / name}/{{train,test}}/<class>/<image>, or give --data a folder."
            ) from error
        pixels = np.asarray(part_set.data)
        if name == "svhn":
            pixels = pixels.transpose(0, 2, 3, 1)
        targets = part_set.labels if name == "svhn" else part_set.targets
        splits.append(_from_arrays(pixels, np.asarray(targets), spec))
    return named.classes or tuple(part_set.classes), splits[0], splits[1]


def _from_arrays(pixels: np.ndarray, labels: np.ndarray, spec: InputSpec) -> Split:
    mode = "L" if spec.channels == 1 else "RGB"
    images = np.stack([to_input(Image.fromarray(image).convert(mode), spec) for image in pixels])
    return Split(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)))


def _stratified(labels: Tensor, classes: tuple[str, ...], fraction: float) -> tuple[Tensor, Tensor]:
    """Split indices in two, holding out `fraction` of each class and at least one image of it."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    kept, held = [], []
    for label, name in enumerate(classes):
        members = (labels == label).nonzero().flatten()
        if len(members) < (2 if fraction else 1):
            raise InterflowError(
                f"class {name} has {len(members)} readable images; holding some out takes at least 2 of every class."
            )
        members = members[torch.randperm(len(members), generator=generator)]
        cut = max(1, round(fraction * len(members))) if fraction else 0
        held.append(members[:cut])
        kept.append(members[cut:])
    return torch.cat(kept).sort().values, torch.cat(held).sort().values


def _fingerprint(classes: tuple[str, ...], *splits: Split) -> str:
    digest = hashlib.sha256("\n".join(classes).encode())
    for split in splits:
        digest.update(split.labels.numpy().tobytes())
        if isinstance(split.images, Tensor):
            digest.update(split.images.numpy().tobytes())
        else:
            digest.update("\n".join(str(path) for path in split.images.paths).encode())
    return digest.hexdigest()
