"""Networks by name, in timm's manner."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatch

from model.backbones.stage import Backbone
from model.backbones.vgg import VGG16
from model.contract import InterflowError
from model.interflow import Interflow
from model.methods import find_method

BACKBONES: dict[str, Callable[..., Backbone]] = {
    "vgg16": VGG16,
}


def list_models(pattern: str = "*") -> list[str]:
    """Names that `create_model` takes, sorted; `pattern` is a shell wildcard."""
    return sorted(name for name in BACKBONES if fnmatch(name, pattern))


def create_model(
    name: str,
    *,
    method: str = "S3",
    num_classes: int = 10,
    in_channels: int = 3,
    depth: int | None = None,
    width: float = 1.0,
    taps: Sequence[int] | None = None,
    shared_heads: bool = True,
    pretrained: bool = False,
) -> Interflow:
    """Build a network with random weights from torch's generator.

    Args:
        name: a backbone of `list_models()`.
        method: "normal" or "S0" to "S9" (Interflow, Table II), any case.
        num_classes: at least 2.
        in_channels: of the image, 1 or 3.
        depth: layers kept; the backbone's full depth where None.
        width: multiplier of the channels.
        taps: layers that a branch is tapped from; the paper's for the method where None.
        shared_heads: branches of equal channels share one linear layer.
        pretrained: weights from elsewhere; no backbone here has any yet.

    Returns:
        The network; its forward pass takes normalised images (N, in_channels, height, width) of any size.

    Raises:
        InterflowError: a name or number that names no such network, saying which ones there are.
    """
    if name not in BACKBONES:
        raise InterflowError(f"backbone {name!r} is unknown; choose one of {', '.join(list_models())}.")
    if num_classes < 2:
        raise InterflowError(f"num_classes {num_classes}: a classifier needs at least 2 classes.")
    if in_channels not in (1, 3):
        raise InterflowError(f"in_channels {in_channels}: expected 1 (grey) or 3 (RGB).")
    if pretrained:
        raise InterflowError(f"{name} has no pretrained weights; leave pretrained off.")
    chosen = find_method(method)
    backbone = BACKBONES[name](in_channels=in_channels, depth=depth, width=width, branches=chosen.branches, taps=taps)
    return Interflow(backbone, chosen, num_classes, shared_heads)
