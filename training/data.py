"""Image sets by name: scikit-learn's digits, public sets, or any folder of images.

Every image comes through `model/images.py`, as it does in the server.
"""

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model.contract import InputSpec, InterflowError
from model.images import to_input
from training.folders import HELD_OUT_TEST, TEST, TRAIN, FoundSet, read_folder
from training.recipe import Recipe
from training.splits import Split, stratified

DIGITS_SIZE, DIGITS_CHANNELS = 8, 1
FOLDER_SIZE, FOLDER_CHANNELS = 64, 3
STATISTICS_SAMPLE = 5000
"""Files that mean and deviation are taken from; images in memory all count."""


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
    """Changes with any pixel or label: a resumed run must see what it saw before."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image."""
        return self.spec.height, self.spec.width

    def to(self, device: torch.device) -> "ImageData":
        """With the images that are in memory on that device."""
        val = self.val and self.val.to(device)
        return replace(self, train=self.train.to(device), val=val, test=self.test.to(device))


def load_data(recipe: Recipe) -> ImageData:
    """Load a recipe's data set, splitting off what is held out.

    Raises:
        InterflowError: nothing there, no images, one class, classes that differ between the splits, damaged images
            (unless the recipe skips them), or too few to hold some out; names the place.
    """
    spec = input_spec(recipe)
    if recipe.data == "digits":
        found = _digits(spec)
    elif recipe.data in NAMED_SETS:
        named = NAMED_SETS[recipe.data]
        root = recipe.data_dir / recipe.data
        if (root / TRAIN).is_dir():
            if not (root / TEST[0]).is_dir():
                raise InterflowError(
                    f"{root} has {TRAIN}/ but no {TEST[0]}/; unpack both, or remove it to download the set."
                )
            found = read_folder(root, spec, recipe)
            if named.classes and found.classes == tuple(str(i) for i in range(len(named.classes))):
                found = replace(found, classes=named.classes)
        else:
            found = _download(recipe.data, named, recipe.data_dir, spec)
    else:
        found = read_folder(Path(recipe.data), spec, recipe)

    for name_of_class, count in zip(
        found.classes, found.test.labels.bincount(minlength=len(found.classes)), strict=True
    ):
        if not count:
            raise InterflowError(f"class {name_of_class} has no readable image in test; every class needs some there.")
    kept, held = stratified(found.train.labels, found.classes, recipe.val_fraction)
    train = found.train.subset(kept)
    if recipe.mean is None:
        mean, std = _statistics(train, recipe.workers)
        spec = spec.model_copy(update={"mean": mean, "std": std})
    return ImageData(
        name=name_of(recipe.data),
        classes=found.classes,
        spec=spec,
        train=train,
        val=found.train.subset(held) if len(held) else None,
        test=found.test,
        skipped=found.skipped,
        fingerprint=hashlib.sha256("\n".join((*found.classes, found.digest)).encode()).hexdigest(),
    )


def is_named(data: str) -> bool:
    """Whether a recipe's `data` is the name of a set, and no folder."""
    return data == "digits" or data in NAMED_SETS


def name_of(data: str) -> str:
    """What cards call a recipe's `data`: the set's name, or the folder's in characters that a model's may have."""
    if is_named(data):
        return data
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(data).resolve().name).strip("._-") or "images"


def input_spec(recipe: Recipe) -> InputSpec:
    """The network's input, with mean 0 and deviation 1 where only the images will tell.

    Raises:
        InterflowError: the recipe's mean or std are not one value per channel.
    """
    if recipe.data == "digits":
        size, channels = DIGITS_SIZE, DIGITS_CHANNELS
    elif recipe.data in NAMED_SETS:
        size, channels = NAMED_SETS[recipe.data].size, NAMED_SETS[recipe.data].channels
    else:
        size, channels = FOLDER_SIZE, FOLDER_CHANNELS
    side, channels = recipe.image_size or size, recipe.channels or channels
    mean, std = recipe.mean or (0.0,) * channels, recipe.std or (1.0,) * channels
    if not len(mean) == len(std) == channels:
        raise InterflowError(f"mean {mean} and std {std}: expected {channels} of each, one per channel of the images.")
    return InputSpec.model_validate(
        {"height": side, "width": side, "channels": channels, "resize": recipe.resize, "mean": mean, "std": std}
    )


def _statistics(split: Split, workers: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel mean and deviation of pixels scaled to 0..1; a channel that never varies gets the deviation 1."""
    count = len(split) if isinstance(split.images, Tensor) else min(len(split), STATISTICS_SAMPLE)
    sample = torch.linspace(0, len(split) - 1, count).long()
    histograms = sum(
        torch.stack([images[..., channel].flatten().bincount(minlength=256) for channel in range(images.shape[-1])])
        for images, _ in split.batches(sample.split(64), workers)
    )
    assert isinstance(histograms, Tensor)  # noqa: S101 - no split is empty
    shares = histograms.double() / histograms.sum(dim=1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = (shares * values).sum(dim=1)
    variance = (shares * (values - mean[:, None]).square()).sum(dim=1)
    if not variance.any():
        raise InterflowError("the training images are all of one colour; there is nothing to learn from.")
    std = variance.sqrt().where(variance > 0, torch.ones(1, dtype=torch.float64))
    return tuple(mean.tolist()), tuple(std.tolist())


def _digits(spec: InputSpec) -> FoundSet:
    """scikit-learn's 1,797 scans of handwritten digits, 8x8 pixels of 17 greys, a fixed fifth of them for test."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 - takes seconds, and only the digits need it

    digits = load_digits()
    images = _to_inputs(np.round(digits.images * (255 / 16)).astype(np.uint8), spec)
    labels = torch.from_numpy(digits.target)
    kept, held = stratified(labels, _DIGIT_NAMES, HELD_OUT_TEST)
    train, test = Split(images[kept], labels[kept]), Split(images[held], labels[held])
    return FoundSet(_DIGIT_NAMES, train, test, _digest(images, labels))


def _download(name: str, named: NamedSet, data_dir: Path, spec: InputSpec) -> FoundSet:
    """A named set through torchvision, which keeps its own copy below `data_dir`."""
    from torchvision import datasets  # noqa: PLC0415 - takes seconds, and only a download needs it

    tensors: list[Tensor] = []
    for part in ("train", "test"):
        which = {"split": part} if name == "svhn" else {"train": part == "train"}
        try:
            part_set = getattr(datasets, named.torchvision)(data_dir, download=True, **which)
        except (OSError, RuntimeError) as error:
            raise InterflowError(
                f"{name} is not in {data_dir / name}, and downloading it failed ({error}). Unpack it as "
                f"{data_dir / name}/{{train,test}}/<class>/<image>, or give --data a folder."
            ) from error
        pixels, labels = np.asarray(part_set.data), part_set.labels if name == "svhn" else part_set.targets
        pixels = pixels.transpose(0, 2, 3, 1) if name == "svhn" else pixels
        tensors += [_to_inputs(pixels, spec), torch.from_numpy(np.asarray(labels, np.int64))]
    classes = named.classes or tuple(part_set.classes)
    return FoundSet(classes, Split(tensors[0], tensors[1]), Split(tensors[2], tensors[3]), _digest(*tensors))


def _to_inputs(pixels: np.ndarray, spec: InputSpec) -> Tensor:
    """uint8 (M, height, width) or (M, height, width, 3) of any size to the network's input."""
    mode = "L" if spec.channels == 1 else "RGB"
    return torch.from_numpy(np.stack([to_input(Image.fromarray(image).convert(mode), spec) for image in pixels]))


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
