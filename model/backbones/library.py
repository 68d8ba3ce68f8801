"""What networks of timm and torchvision share: names that are not there, weights that cannot be fetched, odd sizes."""

import difflib
import socket
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import TypeVar

import torch

from model.backbones.backbone import Backbone, Normalization
from model.contract import InterflowError

IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

PATIENCE_S = 10
"""For each answer of a server that weights are downloaded from."""

BUILD_ERRORS = (TypeError, ValueError, KeyError, AttributeError, AssertionError, RuntimeError)
"""What the libraries' networks raise where an option or a size does not suit them."""

T = TypeVar("T")


def unknown(library: str, name: str, names: Sequence[str]) -> InterflowError:
    """What to raise where the library has no such network: the likeliest names, and how to see all."""
    close = ", ".join(f"{library}/{match}" for match in difflib.get_close_matches(name, names, n=5))
    return InterflowError(
        f"{library}/{name} is unknown: {library} {metadata.version(library)} has no such network; "
        f"{f'did you mean {close}? ' if close else ''}model.registry.list_models('{library}/*') lists all."
    )


def download(name: str, source: str, fetch: Callable[[], T]) -> T:
    """Call what downloads weights; where there is no network it fails within seconds.

    Args:
        name: of the network.
        source: where the weights are, for people.
        fetch: the library's own function.

    Raises:
        InterflowError: they could not be had, and what to do instead.
    """
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE_S)
    try:
        return fetch()
    except InterflowError:  # the weights are there, but not for this network
        raise
    except Exception as error:  # urllib's, httpx's, the hub's and torch's own have no class in common
        reason = f"{type(error).__name__}: {' '.join(str(error).split()).partition('. ')[0]}"
        raise InterflowError(
            f"{name}: its weights could not be downloaded from {source} ({reason}). Where there is no network, bring "
            f"them as a file: --init <file>.safetensors, or pretrained=Path(...)."
        ) from error
    finally:
        socket.setdefaulttimeout(before)


def for_channels(normalization: Normalization, in_channels: int) -> Normalization:
    """RGB's, or for grey images the mean of the three."""
    if in_channels == len(normalization.mean):
        return normalization
    return Normalization(*((sum(values) / len(values),) for values in normalization))


def require_maps(backbone: Backbone, name: str, in_channels: int, image_size: tuple[int, int]) -> None:
    """Try a backbone on one image, so that a size it is not made for is refused before anything is trained.

    Raises:
        InterflowError: it fails, or its maps are not those that its stages promise.
    """
    training = backbone.training
    try:
        with torch.no_grad():
            maps = backbone.eval()(torch.zeros(1, in_channels, *image_size)).maps
    except BUILD_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InterflowError(
            f"{name} does not take images of {image_size[0]}x{image_size[1]} pixels ({reason}); choose another size."
        ) from error
    backbone.train(training)
    shapes, channels = [tuple(feature.shape) for feature in maps], [stage.channels for stage in backbone.stages]
    if any(feature.ndim != 4 for feature in maps) or [feature.shape[1] for feature in maps] != channels:
        raise InterflowError(
            f"{name}: its feature maps are {shapes}, but channels {channels} were expected; choose another."
        )
