"""Which images a network is evaluated on: its own data's test split, or any other."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.contract import InterflowError, ModelCard
from training.data import NAMED_SETS, is_named, load_data, name_of
from training.folders import TRAIN
from training.recipe import Recipe
from training.run import Run
from training.shorten import require_own_images
from training.splits import FolderImages, Split
from training.subjects import Subject

SPLITS = ("train", "val", "test", "all")


@dataclass(frozen=True)
class EvaluationData:
    """Images, and labels by the index that the network's card gives them.

    Attributes:
        name: of the data set.
        split: one of `SPLITS`.
        images: of that split.
        skipped: images of the set that could not be read and were left out.
        seen: whether the network was trained on some of them, as far as its card or recipe tells.
    """

    name: str
    split: str
    images: Split
    skipped: int
    seen: bool


def load_images(subject: Subject, data: str | None, split: str | None, settings: dict[str, Any]) -> EvaluationData:
    """Load the images to evaluate a network on, brought to its input as the server would.

    Args:
        subject: the network.
        data: as of a recipe: a set's name or a folder; the network's own where None.
        split: one of `SPLITS`; where None "test", but "all" of another folder that is not divided.
        settings: of a recipe, such as data_dir and workers, over those of the run.

    Raises:
        InterflowError: no such data or split, other classes than the network's, colour images for a grey network, a
            run's own data that has changed since, or as `load_data`.
    """
    card, own = subject.card, subject.recipe
    name = data or (own.data if own else card.metrics.data)
    if data is None and own is None and not is_named(name):
        raise InterflowError(f"{subject.folder} was trained on the folder {name}, wherever that is; give it by --data.")
    is_own = _place(name) == _place(own.data) if own else name_of(name) == card.metrics.data
    _require_colours(name, card, is_own)
    recipe = _recipe(card, own if is_own else None, name, settings)
    if split is None:
        divided = is_named(name) or (Path(name) / TRAIN).is_dir()
        split = "test" if is_own or divided else "all"
    if split == "val" and not (is_own and own and own.val_fraction):
        raise InterflowError(
            f"--split val: nothing that is known was held out of {name} for {subject.folder}; "
            f"choose test, or evaluate the run that held some out."
        )
    found = load_data(recipe)
    if is_own and own:
        require_own_images(Run(subject.folder), recipe, found)
    if found.spec != card.input:
        raise InterflowError(f"{subject.folder}: its input {card.input} is none that images are read to here.")
    order = _class_indices(found.classes, card, found.name)
    parts = {"train": found.train, "val": found.val, "test": found.test}
    chosen = [part for key, part in parts.items() if part is not None and split in (key, "all")]
    images = _joined(chosen) if len(chosen) > 1 else chosen[0]
    images = Split(images.images, order[images.labels], images.paths)
    return EvaluationData(found.name, split, images, found.skipped, is_own and split in ("train", "all"))


def _place(data: str) -> str | Path:
    """A set's name, or where a folder is, however it is written."""
    return data if is_named(data) else Path(data).resolve()


def _recipe(card: ModelCard, own: Recipe | None, name: str, settings: dict[str, Any]) -> Recipe:
    """The run's own, so that its splits are; else one that reads images as the card says."""
    if own:
        return own.model_copy(update={"mean": card.input.mean, "std": card.input.std} | settings)
    return Recipe.model_validate(
        {
            "data": name,
            "image_size": card.input.height,
            "channels": card.input.channels,
            "resize": card.input.resize,
            "mean": card.input.mean,
            "std": card.input.std,
            "val_fraction": 0,
        }
        | settings
    )


def _require_colours(name: str, card: ModelCard, is_own: bool) -> None:
    if name in NAMED_SETS and NAMED_SETS[name].channels > card.input.channels and not is_own:
        raise InterflowError(
            f"--data {name} is in colour, and {card.name} takes grey images; choose a network of three channels."
        )


def _class_indices(classes: tuple[str, ...], card: ModelCard, name: str) -> Tensor:
    """The network's index of each class of the data."""
    if set(classes) != set(card.classes):
        missing, odd = (_few(sorted(set(a) - set(b))) for a, b in ((card.classes, classes), (classes, card.classes)))
        differences = [f"the network's {missing} are not in the data"] if missing else []
        differences += [f"the data's {odd} are none of the network's"] if odd else []
        raise InterflowError(
            f"--data {name}: its classes are not those of {card.name}: {', and '.join(differences)}. Rename the class "
            f"folders, or choose other data."
        )
    return torch.tensor([card.classes.index(label) for label in classes])


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _joined(parts: list[Split]) -> Split:
    labels = torch.cat([part.labels for part in parts])
    paths = [path for part in parts for path in part.paths or ()] or None
    if all(isinstance(part.images, Tensor) for part in parts):
        return Split(torch.cat([part.images for part in parts if isinstance(part.images, Tensor)]), labels, paths)
    folders = [part.images for part in parts if isinstance(part.images, FolderImages)]
    return Split(FolderImages([path for folder in folders for path in folder.paths], folders[0].spec), labels, paths)
