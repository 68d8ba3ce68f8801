"""What every backbone is: tappable points from shallow to deep, and a forward pass that returns the tapped maps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor, nn

from model.contract import InterflowError


@dataclass(frozen=True)
class Stage:
    """A span of the backbone that ends in a feature map which a branch can be tapped from.

    Attributes:
        name: such as "conv7" or "stage2.block3".
        depth: layers up to the tap.
        channels: of the map.
        end: whether a stage of the architecture itself ends here, before width or resolution change.
    """

    name: str
    depth: int
    channels: int
    end: bool = False


class LayerAttention(NamedTuple):
    """Which sources one block drew on, for N images.

    A share's weights sum to 1 over the sources (AFI, MRLA-base, AFF as w and 1 - w); a gate is a number in 0..1 by
    itself (MRLA-light).
    """

    block: str
    module: str
    kind: Literal["share", "gate"]
    sources: tuple[str, ...]
    weights: Tensor
    """(N, sources), averaged over channels, heads and positions."""


class Normalization(NamedTuple):
    """Mean and deviation per channel, of pixels scaled to 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Features(NamedTuple):
    """What a backbone gives: maps (N, channels, h, w) of its stages, shallow to deep, and its layers' own attention."""

    maps: list[Tensor]
    attention: list[LayerAttention]


class Backbone(nn.Module):
    """A network without its classifier.

    It is built whole; `tap` chooses the stages and drops what lies behind the last. Constructors take `in_channels`
    and `width` (multiplier of the channels), and options of their own.

    Attributes:
        points: all that can be tapped.
        stages: the tapped ones; all points before `tap` was called.
        own_branches: how many branches its paper gives this network, where that is not the method's 4 or 7.
        normalization: of the images that its pretrained weights expect; None for random ones.
    """

    points: list[Stage]
    stages: list[Stage]
    own_branches: int | None = None
    normalization: Normalization | None = None

    def __init__(self, points: Sequence[Stage]) -> None:
        super().__init__()
        self.points = self.stages = list(points)

    @property
    def depth(self) -> int:
        """Layers kept."""
        return self.stages[-1].depth

    def tap(self, branches: int, depth: int | None = None, taps: Sequence[int | str] | None = None) -> None:
        """Choose the stages.

        Args:
            branches: how many where `taps` does not say; one per stage where there are not so many points.
            depth: layers kept, the depth of one of `points`; all where None.
            taps: names of points, or their numbers, counted from 1; ascending, the last one at `depth`.

        Raises:
            InterflowError: there are no such points; it lists those there are.
        """
        kept = [point for point in self.points if depth is None or point.depth <= depth]
        if depth is not None and (not kept or kept[-1].depth != depth):
            depths = ", ".join(str(point.depth) for point in self.points)
            raise InterflowError(f"depth {depth}: this network can be cut after layer {depths}.")
        chosen = self.default_taps(kept, branches) if taps is None else [_find(kept, tap) for tap in taps]
        places = [kept.index(point) for point in chosen]
        if not chosen or places != sorted(set(places)) or chosen[-1] != kept[-1]:
            given = ", ".join(str(tap) for tap in taps or [point.name for point in chosen]) or "(none)"
            raise InterflowError(
                f"taps {given}: expected points in ascending order, ending with the last one ({kept[-1].name}): what "
                f"lies behind the last tap would learn nothing. There are {_listing(kept)}."
            )
        self.points, self.stages = kept, chosen
        self.keep()

    def default_taps(self, points: Sequence[Stage], branches: int) -> list[Stage]:
        """Where that many branches are tapped if nobody says: at the ends of the deepest stages of the architecture.

        Evenly over all points where it has too few stages, and one per stage where it has too few points as well.
        """
        ends = [point for point in points if point.end or point is points[-1]]
        if branches <= len(ends):
            return ends[-branches:]
        return evenly(points, branches) if branches <= len(points) else ends

    def keep(self) -> None:
        """Drop the modules behind the last tap; called by `tap`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Features:
        """Normalised images (N, channels, height, width) to the tapped feature maps."""
        raise NotImplementedError


def evenly(points: Sequence[Stage], count: int) -> list[Stage]:
    """Points number round(n i / count), i = 1..count: evenly spaced, ending with the last."""
    return [points[round(len(points) * i / count) - 1] for i in range(1, count + 1)]


def _find(points: Sequence[Stage], tap: int | str) -> Stage:
    number = int(tap) if isinstance(tap, int) or tap.isdecimal() else None
    for place, point in enumerate(points, start=1):
        if tap == point.name or number == place:
            return point
    raise InterflowError(f"tap {tap!r} is not a point of this network; by number or name there are {_listing(points)}.")


def _listing(points: Sequence[Stage]) -> str:
    return ", ".join(f"{place} {point.name}" for place, point in enumerate(points, start=1))
