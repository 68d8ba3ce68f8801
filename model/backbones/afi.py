"""AFI inside a residual block (AFINets, Sec. 3.3): its first convolution is joined by what earlier blocks' gave.

Block 1 of every stage stays as it is. Block i >= 2, with C the channels that its first convolution had without AFI::

    X_i = relu(BN(conv1(x)))                 D channels: C/2 ("half replaced"), or C ("expanded", the networks named -B)
    R_i = AFI(X_1, ..., X_{i-1})             D channels
    U   = concat([X_i, R_i])                 goes where conv1's output went; the next convolution takes 2 D channels
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.backbones.backbone import Backbone
from model.backbones.chain import Block, Memory
from model.contract import InterflowError
from model.layers.afi import AFI
from model.options import require_count, require_flag, require_stages

ChannelAttention = Literal["se", "ge", "cbam", "eca"]


class Feature(NamedTuple):
    """What a block leaves for later ones of its stage: X (N, D, h, w) and its spatial mean (N, D), taken once."""

    block: str
    map: Tensor
    pooled: Tensor


@dataclass(frozen=True)
class AFISettings:
    """How a network takes up AFI. What the paper leaves open is an option, its default the likelier reading.

    Attributes:
        expanded: D = C (the -B networks), else D = C/2.
        reduction: r of the AFI modules.
        stages: those that have it, counted from 1; all where None (AFINets, Table 1).
        attention: channel attention on the fused feature R (AFINets, Table 2): "se", "ge", "cbam" or "eca".
        first: what X_1 of the plain block 1 is: "slice", its leading D channels where it has so many; or "own": none,
            so that block 2, having nothing earlier, takes its own feature.
        interleaved: U is X and R channel by channel, in turn, rather than X and then R.
    """

    expanded: bool
    reduction: int
    stages: Sequence[int] | None = None
    attention: ChannelAttention | None = None
    first: Literal["slice", "own"] = "slice"
    interleaved: bool = False

    def __post_init__(self) -> None:
        require_count("reduction", self.reduction)
        if self.attention is not None and self.attention not in get_args(ChannelAttention):
            raise InterflowError(
                f"attention {self.attention!r}: choose one of {', '.join(get_args(ChannelAttention))}."
            )
        if self.first not in ("slice", "own"):
            raise InterflowError(f"first {self.first!r}: choose slice or own.")
        require_flag("interleaved", self.interleaved)

    def require_stages(self, count: int) -> None:
        """Refuse, by an InterflowError, stages that a network of so many does not have."""
        if self.stages is not None:
            require_stages(self.stages, count)

    def features(self, channels: int) -> int:
        """D, of a first convolution of C channels."""
        return channels if self.expanded else max(1, channels // 2)


class Remember(nn.Module):
    """In block 1: leaves X_1, brought to the stage's size by 2x2 mean pooling where the block's stride comes later.

    Args:
        channels: D; a block with fewer channels leaves nothing.
        stride: of what follows the first convolution.
        settings: of the network.
    """

    def __init__(self, channels: int, stride: int, settings: AFISettings) -> None:
        super().__init__()
        self.channels, self.stride, self.first = channels, stride, settings.first

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """The first convolution's output, unchanged."""
        if self.first == "slice" and x.shape[1] >= self.channels:
            feature = x[:, : self.channels]
            if self.stride > 1:
                feature = functional.avg_pool2d(feature, self.stride, ceil_mode=True)
            memory.earlier.append(Feature(memory.block, feature, feature.mean(dim=(2, 3))))
        return x


class Integrate(nn.Module):
    """In block i >= 2: X_i to U (N, 2 D, h, w); leaves X_i.

    Args:
        channels: D.
        settings: of the network.
    """

    def __init__(self, channels: int, settings: AFISettings) -> None:
        super().__init__()
        self.afi = AFI(channels, settings.reduction)
        self.attention = _channel_attention(settings.attention, channels)
        self.interleaved = settings.interleaved

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """X_i (N, D, h, w), the first convolution's output, to U."""
        own = Feature(memory.block, x, x.mean(dim=(2, 3)))
        earlier: list[Feature] = memory.earlier or [own]
        fused, weights = self.afi([feature.map for feature in earlier], [feature.pooled for feature in earlier])
        memory.drew_on("AFI", "share", [feature.block for feature in earlier], weights.mean(dim=2).T)
        memory.earlier = [*memory.earlier, own]
        fused = self.attention(fused)
        return torch.stack([x, fused], dim=2).flatten(1, 2) if self.interleaved else torch.cat([x, fused], dim=1)


def _channel_attention(name: str | None, channels: int) -> nn.Module:
    if name is None:
        return nn.Identity()
    from timm import layers  # noqa: PLC0415 - takes seconds, and only Table 2 needs it

    # gather-excite in its form without parameters: timm 1.0.31 cannot build the one with an MLP
    return layers.create_attn(name, channels, **{"use_mlp": False} if name == "ge" else {})


class FirstLayer(Block):
    """A block's first convolution, and what AFI adds to it.

    Args:
        convolution: with batch norm and ReLU.
        afi: joins or remembers its output; None without AFI.
        out_channels: of what this gives.
    """

    def __init__(self, convolution: nn.Module, afi: Remember | Integrate | None, out_channels: int) -> None:
        super().__init__()
        self.convolution, self.afi, self.out_channels = convolution, afi, out_channels

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """As `Block.forward`."""
        feature = self.convolution(x)
        return feature if self.afi is None else self.afi(feature, memory)


def first_layer(
    settings: AFISettings | None,
    convolution: Callable[[int], nn.Module],
    channels: int,
    *,
    stage: int,
    block: int,
    stride: int = 1,
    later: int | None = None,
) -> FirstLayer:
    """Make a block's first convolution.

    Args:
        settings: None for a network without AFI.
        convolution: makes it, of so many output channels.
        channels: C, of the convolution without AFI.
        stage: counted from 1.
        block: within the stage, counted from 1.
        stride: of what follows the first convolution.
        later: C in the stage's other blocks, where it is another.
    """
    if settings is None or (settings.stages is not None and stage not in settings.stages):
        return FirstLayer(convolution(channels), None, channels)
    if block == 1:
        remember = Remember(settings.features(later or channels), stride, settings)
        return FirstLayer(convolution(channels), remember, channels)
    features = settings.features(channels)
    return FirstLayer(convolution(features), Integrate(features, settings), 2 * features)


def with_afi(build: Callable[..., Backbone], *, expanded: bool, reduction: int) -> Callable[..., Backbone]:
    """A builder whose options are those of `AFISettings`, from one that takes them as `afi`."""
    default = reduction

    def build_with_afi(
        *,
        in_channels: int,
        width: float,
        stages: Sequence[int] | None = None,
        reduction: int = default,
        attention: ChannelAttention | None = None,
        first: Literal["slice", "own"] = "slice",
        interleaved: bool = False,
    ) -> Backbone:
        settings = AFISettings(expanded, reduction, stages, attention, first, interleaved)
        return build(in_channels=in_channels, width=width, afi=settings)

    return build_with_afi
