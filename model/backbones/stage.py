"""What a backbone says of itself."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Stage:
    """A span of the backbone that ends in a tapped feature map.

    Attributes:
        name: such as "conv7".
        depth: layers up to the tap.
        channels: of the tapped map.
    """

    name: str
    depth: int
    channels: int


class Backbone(Protocol):
    """A network whose forward pass returns the tapped feature maps, (N, channels, h, w), from shallow to deep."""

    depth: int
    stages: list[Stage]

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Normalised images (N, channels, height, width) to feature maps."""
        ...
