"""VGG-16's convolutions, and the very deep plain networks stretched from them (Interflow, Sec. III-D and IV-F)."""

from collections.abc import Sequence

from torch import nn

from model.backbones.backbone import Stage, evenly
from model.backbones.chain import Chain, Plain
from model.contract import InterflowError
from model.initialization import xavier
from model.layers.convolution import conv_bn, scaled

WIDTHS = (64, 128, 256, 512, 512)
"""Channels of the five blocks. The first convolution of blocks 2 to 5 has stride 2, for the pooling before it."""
ENDS = (2, 4, 7, 10, 13)
"""Last convolution of each block of VGG-16."""

TAPS = {4: (7, 9, 11, 13), 7: (7, 8, 9, 10, 11, 12, 13)}
"""Tapped convolutions by number of branches: the paper's first stage ends at convolution 7."""

SHALLOWEST = 4
"""The paper's Table I cuts after the 4th to the 13th convolution."""

PLAIN_BRANCHES = {40: 5, 50: 7, 60: 9, 70: 11, 80: 13, 90: 15, 100: 15}
"""Branches of a plain network by depth (Interflow, Table VI)."""


class _Plain(Chain):
    """Convolutions 3x3 with batch norm and ReLU, in five blocks; no pooling, no shortcut, no hidden linear layer.

    A 32x32 image runs at 32, 16, 8, 4, 2 pixels. The layers are numbered from 1.
    """

    def __init__(self, in_channels: int, width: float, ends: Sequence[int]) -> None:
        blocks, channels, layer = [], in_channels, 0
        for block, (full_width, end) in enumerate(zip(WIDTHS, ends, strict=True)):
            row = []
            for i in range(end - layer):
                layer += 1
                previous, channels = channels, scaled(full_width, width)
                convolution = Plain(*conv_bn(previous, channels, stride=2 if block > 0 and i == 0 else 1))
                row.append((Stage(f"conv{layer}", layer, channels), convolution))
            blocks.append(row)
        super().__init__(nn.Identity(), blocks)
        self.apply(xavier)


class VGG16(_Plain):
    """The 13 convolutions of VGG-16, or the first 4 to 12 of them (Interflow, Table I).

    Args:
        in_channels: of the image.
        width: multiplier of every layer's channels.
    """

    def __init__(self, *, in_channels: int, width: float) -> None:
        super().__init__(in_channels, width, ENDS)

    def tap(self, branches: int, depth: int | None = None, taps: Sequence[int | str] | None = None) -> None:
        """As `Backbone.tap`, from a depth of 4."""
        if depth is not None and not SHALLOWEST <= depth <= ENDS[-1]:
            raise InterflowError(f"depth {depth}: vgg16 has {SHALLOWEST} to {ENDS[-1]} convolutions.")
        super().tap(branches, depth, taps)

    def default_taps(self, points: Sequence[Stage], branches: int) -> list[Stage]:
        """The paper's."""
        if branches == 1:
            return [points[-1]]
        if branches not in TAPS:
            return super().default_taps(points, branches)
        depth = len(points)
        if depth < ENDS[-1]:
            raise InterflowError(
                f"{branches} branches tap convolutions {', '.join(map(str, TAPS[branches]))}, but the depth is "
                f"{depth}; choose the taps (up to {depth}, the last one {depth}), or depth {ENDS[-1]}."
            )
        return [points[number - 1] for number in TAPS[branches]]


class PlainNet(_Plain):
    """VGG-16 stretched to 40 to 100 convolutions, without residual connections (Interflow, Sec. IV-F and Table VI).

    Blocks end at layer round(layers * {2, 4, 7, 10, 13} / 13).

    Args:
        in_channels: of the image.
        width: multiplier of every layer's channels.
        layers: 40, 50, 60, 70, 80, 90 or 100.
    """

    def __init__(self, *, in_channels: int, width: float, layers: int) -> None:
        super().__init__(in_channels, width, [round(layers * end / ENDS[-1]) for end in ENDS])
        self.own_branches = PLAIN_BRANCHES[layers]

    def default_taps(self, points: Sequence[Stage], branches: int) -> list[Stage]:
        """Evenly spaced, at layer round(layers * i / branches); the first of Table VI falls at 6 to 8."""
        return evenly(points, branches)
