"""Networks by name, in timm's manner."""

import inspect
from collections.abc import Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from model.backbones.backbone import Backbone
from model.backbones.from_timm import TimmNetwork
from model.backbones.from_torchvision import TorchvisionNetwork
from model.backbones.weights import IN_CHECKPOINT, few, load_weights, read_weights
from model.catalogue import BACKBONES
from model.contract import InterflowError
from model.interflow import Interflow
from model.methods import Method, find_method

NO_OPTIONS = {"in_channels", "width", "image_size", "afi", "fusion", "mrla"}
"""Of a backbone's arguments, those that have a name of their own here, or in the catalogue a network of its own."""

LIBRARIES: dict[str, type[TimmNetwork | TorchvisionNetwork]] = {"timm": TimmNetwork, "torchvision": TorchvisionNetwork}


def list_models(pattern: str = "*") -> list[str]:
    """Names that `create_model` takes, sorted; `pattern` is a shell wildcard.

    Those of this project; or of a library, where the pattern begins with its name: `timm/*`, `torchvision/resnet*`.
    """
    library = pattern.partition("/")[0]
    names = [f"{library}/{name}" for name in LIBRARIES[library].names()] if library in LIBRARIES else list(BACKBONES)
    return sorted(name for name in names if fnmatch(name, pattern))


def create_model(
    name: str,
    *,
    method: str | Method = "S3",
    num_classes: int = 10,
    in_channels: int = 3,
    depth: int | None = None,
    width: float = 1.0,
    taps: Sequence[int | str] | None = None,
    shared_heads: bool = True,
    neck: str | None = None,
    image_size: tuple[int, int] | None = None,
    pretrained: bool | Path = False,
    **options: Any,
) -> Interflow:
    """Build a network with random weights from torch's generator.

    Args:
        name: a backbone of `list_models()`, `timm/<name>` or `torchvision/<name>`.
        method: "normal" or "S0" to "S9" (Interflow, Table II), any case. Where the backbone has fewer points to tap
            than the method's 4 or 7 branches, it has one branch per stage. Or a `Method` of one's own.
        num_classes: at least 2.
        in_channels: of the image, 1 or 3.
        depth: layers kept; the backbone's full depth where None.
        width: multiplier of the channels.
        taps: points that a branch is tapped from, by name or by number from 1; the method's where None.
        shared_heads: branches of equal channels share one linear layer.
        neck: "aff" or "iaff": a top-down path that fuses each stage's map with the deeper ones before its branch.
        image_size: height and width; networks with position embeddings are made for one size, others ignore it.
        pretrained: True for the weights that timm or torchvision download; or a safetensors file: a checkpoint of this
            project whose backbone has these layers or more, or for a library's network its own weights.
        options: the backbone's own.

    Returns:
        The network; its forward pass takes normalised images (N, in_channels, height, width).

    Raises:
        InterflowError: a name, number or option that names no such network, saying which ones there are; weights that
            cannot be had, or do not fit.
    """
    if num_classes < 2:
        raise InterflowError(f"num_classes {num_classes}: a classifier needs at least 2 classes.")
    if in_channels not in (1, 3):
        raise InterflowError(f"in_channels {in_channels}: expected 1 (grey) or 3 (RGB).")
    if not 0 < width < float("inf"):
        raise InterflowError(f"width {width}: expected a positive multiplier of the channels, such as 0.5.")
    chosen = method if isinstance(method, Method) else find_method(method)
    checkpoint = read_weights(pretrained, IN_CHECKPOINT) if isinstance(pretrained, Path) else {}
    pretrained_whole = False if checkpoint else pretrained
    backbone = _build(
        name, options, in_channels=in_channels, width=width, image_size=image_size, pretrained=pretrained_whole
    )
    whole = backbone.state_dict()
    own = backbone.own_branches if chosen.initial_weights is None else None
    backbone.tap(own or chosen.branches, depth, taps)
    if checkpoint:
        load_weights(backbone, checkpoint, f"{pretrained} for {name}", spare=whole)
    return Interflow(backbone, chosen, num_classes, shared_heads, neck)


def _build(
    name: str,
    options: dict[str, Any],
    *,
    in_channels: int,
    width: float,
    image_size: tuple[int, int] | None,
    pretrained: bool | Path,
) -> Backbone:
    library, slash, rest = name.partition("/")
    if slash and library in LIBRARIES:
        if width != 1:
            raise InterflowError(f"width {width}: the channels of {name} are fixed; leave width at 1.")
        return LIBRARIES[library](
            rest, in_channels=in_channels, image_size=image_size, pretrained=pretrained, **options
        )
    if name not in BACKBONES:
        raise InterflowError(
            f"backbone {name!r} is unknown; choose one of {', '.join(list_models())}, "
            f"or {' or '.join(f'{library}/<name>' for library in LIBRARIES)}."
        )
    if pretrained is True:
        raise InterflowError(f"{name} has no weights to download; give a safetensors file, or leave pretrained off.")
    if pretrained:
        raise InterflowError(
            f"{pretrained}: {name} takes the weights of a checkpoint, where names begin with {IN_CHECKPOINT}; "
            f"these are {few(read_weights(pretrained))}."
        )
    build = BACKBONES[name].build
    arguments = inspect.signature(build).parameters
    fixed = build.keywords if isinstance(build, partial) else {}
    own = [key for key in arguments if key not in NO_OPTIONS and key not in fixed]
    for key in options:
        if key not in own:
            raise InterflowError(f"{name} has no option {key!r}; it has {', '.join(own) or 'none'}.")
    if "image_size" in arguments:
        options = options | {"image_size": image_size}
    return build(in_channels=in_channels, width=width, **options)
