"""Everything that decides a run: a YAML recipe, then the command line over it."""

import argparse
import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from model.contract import InterflowError

RECIPES = Path(__file__).parent / "recipes"

SEVERAL = {"taps": "TAP", "options": "NAME=VALUE", "mean": "MEAN", "std": "STD"}
"""Settings that take several values on the command line, and what one of them is called in its help."""

Size = Annotated[int, Field(ge=1, le=4096)]
Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _number(value: Any) -> Any:
    """A command line's text as the number that a Literal is compared with."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _mapping(value: Any) -> Any:
    """A command line's `name=value` texts as a mapping; values are YAML."""
    if not isinstance(value, list):
        return value
    pairs = [str(text).partition("=") for text in value]
    if any(not separator for _, separator, _ in pairs):
        raise ValueError("expected name=value, such as stages=[1,2]")
    try:
        return {name: yaml.safe_load(text) for name, _, text in pairs}
    except yaml.YAMLError as error:
        raise ValueError(f"not a value that YAML reads ({' '.join(str(error).split())})") from error


def _setting(group: str, default: Any, text: str) -> Any:
    return Field(default, description=text, json_schema_extra={"group": group})


class Recipe(BaseModel):
    """The resolved configuration of a run, printed at its start and saved with it.

    Each field is a key of a recipe's YAML file and an option of `training/train.py`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: Annotated[str, Field(min_length=1)] = _setting(
        "data", "digits", "digits, cifar10, cifar100, svhn, mnist, kmnist, fashion_mnist, or a folder"
    )
    data_dir: Path = _setting("data", Path("data"), "where named sets lie, or are downloaded to")
    image_size: Size | None = _setting("data", None, "pixels a side; the set's own, or 64 for a folder")
    channels: Annotated[Literal[1, 3] | None, BeforeValidator(_number)] = _setting(
        "data", None, "1 grey, 3 RGB; the set's own, or 3 for a folder"
    )
    resize: Literal["crop", "pad", "squash"] = _setting("data", "crop", "crop, pad or squash, of other shapes")
    mean: tuple[Probability, ...] | None = _setting(
        "data", None, "per channel, of pixels scaled to 0..1; what the weights of --init expect, or the images' own"
    )
    std: tuple[Positive, ...] | None = _setting("data", None, "as --mean, with which it comes")
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = _setting("data", 0.1, "of train, held out to fit readings on")
    skip_bad_images: bool = _setting("data", False, "leave out and count images that cannot be read")
    balance: Literal["none", "loss", "sampler"] = _setting(
        "data", "none", "for rare classes: loss weighs images, sampler draws them, by 1 / images of their class"
    )
    cache: bool = _setting("data", True, "keep the decoded images of a folder below data_dir for the next run")
    workers: Annotated[int, Field(ge=0)] = _setting("data", _usable_cpus(), "processes that decode a folder")

    backbone: str = _setting("network", "vgg16", "name of a registered backbone, timm/<name> or torchvision/<name>")
    init: str | None = _setting(
        "network",
        None,
        "of the backbone: pretrained (those that timm or torchvision download), or a .safetensors file with such "
        "weights or a run's checkpoint; else random",
    )
    method: str = _setting("network", "S3", "normal, or S0 to S9 (Interflow, Table II)")
    depth: int | None = _setting("network", None, "layers of the backbone; all of them")
    width: Annotated[float, Field(gt=0, le=64)] = _setting("network", 1.0, "multiplier of the layers' channels")
    taps: tuple[Annotated[int | str, BeforeValidator(_number)], ...] | None = _setting(
        "network", None, "points to tap instead of the method's, by name or by number from 1"
    )
    neck: Literal["aff", "iaff"] | None = _setting(
        "network", None, "aff or iaff: fuse each stage's map with the deeper ones before its branch"
    )
    options: Annotated[dict[str, Any], BeforeValidator(_mapping)] = _setting(
        "network", {}, "of this backbone alone, such as afi_stages=[1,2]"
    )
    shared_heads: bool = _setting("network", True, "one linear layer for branches of equal channels")

    epochs: Annotated[int, Field(ge=1)] = _setting("training", 100, "passes over the training images")
    batch_size: Annotated[int, Field(ge=2, le=65536)] = _setting("training", 64, "images a step")
    lr: Positive = _setting("training", 1e-3, "learning rate, at its highest")
    backbone_lr: Positive = _setting("training", 1.0, "factor of the learning rate for the backbone")
    freeze: Literal["none", "backbone"] = _setting("training", "none", "none or backbone: train all, or the rest only")
    momentum: Annotated[float, Field(ge=0, lt=1)] = _setting("training", 0.95, "of SGD")
    nesterov: bool = _setting("training", False, "Nesterov's momentum")
    weight_decay: NonNegative = _setting("training", 5e-4, "of all parameters")
    schedule: Literal["step", "one_cycle"] = _setting("training", "step", "step or one_cycle, of the learning rate")
    drop_epochs: Annotated[int, Field(ge=0)] = _setting("training", 0, "step: last epochs, at a tenth of the rate")
    warmup: Probability = _setting("training", 0.2, "one_cycle: share of the steps in which the rate rises")
    auxiliary_loss: NonNegative = _setting("training", 0.0, "weight of the loss on every stage's contribution")
    distillation: NonNegative = _setting("training", 0.0, "weight of every stage's divergence from the fused answer")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = _setting(
        "training", 0.0, "of the labels, towards all classes alike"
    )
    ema: Annotated[float, Field(ge=0, lt=1)] = _setting(
        "training", 0.0, "share of the run's steps that the moving average of the weights reaches back; 0: no average"
    )
    crop_padding: Annotated[int, Field(ge=0, le=1024)] = _setting(
        "training", 0, "zeros around an image, then a random crop"
    )
    flip: Probability = _setting("training", 0.0, "chance of a mirrored image")
    invert: Probability = _setting("training", 0.0, "chance of an image in negative")
    cutout: Annotated[int, Field(ge=0, le=4096)] = _setting(
        "training", 0, "pixels a side of a square of the mean colour, put over every image at random"
    )
    weigh_anew: bool = _setting(
        "training", False, "at the end, fit a factor for each stage's learned attention weights on held-out images"
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = _setting("training", 0, "of weights, order and augmentation")
    precision: Literal["float32", "bfloat16"] = _setting("training", "float32", "float32 or bfloat16")
    channels_last: bool = _setting("training", False, "keep the channels of a pixel side by side in memory")
    compile: bool = _setting("training", False, "compile forward and backward pass (torch.compile)")
    cuda_graph: bool = _setting("training", True, "replay the step as one CUDA graph, where the images lie on the GPU")
    device: Literal["auto", "cpu", "cuda"] = _setting("training", "auto", "auto, cpu or cuda")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std are given together or not at all")
        if self.freeze == "backbone" and self.init is None:
            raise ValueError("a frozen backbone needs weights to start from: give --init, or --freeze none")
        return self

    def to_yaml(self) -> str:
        """The recipe as a YAML file that reads back equal."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """Add one option for every field of `Recipe`, in named groups, all defaulting to "not given"."""
    groups: dict[str, Any] = {}
    for name, field in Recipe.model_fields.items():
        extra = field.json_schema_extra
        title = str(extra["group"]) if isinstance(extra, dict) else "other"
        group = groups.setdefault(title, None) or parser.add_argument_group(title)
        groups[title] = group
        flag, not_given = "--" + name.replace("_", "-"), argparse.SUPPRESS
        text = field.description or ""
        if field.default is not None:
            text += f" (default: {field.default})"
        if field.annotation is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=not_given, help=text)
        elif name in SEVERAL:
            group.add_argument(flag, nargs="+", metavar=SEVERAL[name], default=not_given, help=text)
        else:
            group.add_argument(flag, metavar=name.split("_")[-1].upper(), default=not_given, help=text)


def resolve_recipe(recipe: str | None, options: dict[str, Any]) -> Recipe:
    """Read the recipe, lay its settings for the data set over it, then the options given.

    Args:
        recipe: "digits", "paper", the path of a YAML file, or None: "digits" for the digits, else "paper".
        options: settings by field name, as text or in their own type.

    Raises:
        InterflowError: no such recipe, or a setting it does not have or take, named.
    """
    if recipe is None:
        recipe = "digits" if options.get("data", "digits") == "digits" else "paper"
    settings = _read(recipe)
    by_data = settings.pop("by_data", {})
    if not isinstance(by_data, dict) or not all(isinstance(part, dict) for part in by_data.values()):
        raise InterflowError(f"recipe {recipe}: by_data must map names of data sets to settings.")
    data = options.get("data", settings.get("data", "digits"))
    mine = by_data.get(data, {}) if isinstance(data, str) else {}
    return _validate(settings | mine | options, f"recipe {recipe} with the options given")


def load_recipe(path: Path) -> Recipe:
    """The resolved recipe that a run was saved with. Raises InterflowError as `resolve_recipe`."""
    return _validate(_read(str(path)), str(path))


def _read(recipe: str) -> dict[str, Any]:
    named = RECIPES / f"{recipe}.yaml"
    path = named if named.is_file() else Path(recipe)
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
        raise InterflowError(
            f"recipe {recipe}: not one of {known}, nor a YAML file that can be read ({error})."
        ) from error
    if not isinstance(settings, dict):
        raise InterflowError(f"recipe {recipe}: expected a YAML mapping of settings, such as `epochs: 10`.")
    return settings


def _validate(settings: dict[str, Any], source: str) -> Recipe:
    try:
        return Recipe.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:
            raise InterflowError(f"{source}: {first['msg'].removeprefix('Value error, ')}.") from error
        name = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            raise InterflowError(f"{source}: there is no setting {name!r}; see --help for those there are.") from error
        raise InterflowError(f"{source}: {name} is {first['input']!r}: {first['msg']}.") from error
