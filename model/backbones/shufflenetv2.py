"""ShuffleNetV2 for CIFAR, as kuangliu/pytorch-cifar has it at size 1, plain or with AFI.

The AFI paper's ShuffleNetV2 rows (0.94 M parameters) fit none of the variants tried; this is the nearest sound reading:
AFI on the first 1x1 convolution of the blocks of stride 1.
"""

from functools import partial

import torch
from torch import Tensor, nn

from model.backbones.afi import AFISettings, FirstLayer, first_layer
from model.backbones.backbone import Stage
from model.backbones.chain import Block, Chain, Memory, Plain
from model.initialization import he
from model.layers.convolution import conv_bn, scaled

STEM, LAST = 24, 1024
ROWS = ((116, 3), (232, 7), (464, 3))
"""Channels of each stage, and its blocks of stride 1 behind the first."""


def shuffle(x: Tensor) -> Tensor:
    """Two halves of the channels, interleaved."""
    return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


class DownBlock(Block):
    """Stride 2: both halves of the output are convolved from the whole input.

    Args:
        in_channels: of x.
        half: half of the output's channels.
        first: first layer of the right half.
    """

    def __init__(self, in_channels: int, half: int, first: FirstLayer) -> None:
        super().__init__()
        self.left = nn.Sequential(
            conv_bn(in_channels, in_channels, 3, stride=2, groups=in_channels, relu=False),
            conv_bn(in_channels, half, 1),
        )
        self.first = first
        self.rest = nn.Sequential(conv_bn(half, half, 3, stride=2, groups=half, relu=False), conv_bn(half, half, 1))

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """As `Block.forward`."""
        return shuffle(torch.cat([self.left(x), self.rest(self.first(x, memory))], dim=1))


class ShuffleBlock(Block):
    """Stride 1: one half of the channels passes, the other is convolved 1x1, 3x3 depthwise, 1x1.

    Args:
        half: half of the channels, C.
        first: first layer.
    """

    def __init__(self, half: int, first: FirstLayer) -> None:
        super().__init__()
        self.first = first
        spatial = min(half, first.out_channels)
        self.rest = nn.Sequential(
            conv_bn(first.out_channels, spatial, 3, groups=spatial, relu=False), conv_bn(spatial, half, 1)
        )

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """As `Block.forward`."""
        passed, convolved = x.chunk(2, dim=1)
        return shuffle(torch.cat([passed, self.rest(self.first(convolved, memory))], dim=1))


class ShuffleNetV2(Chain):
    """ShuffleNetV2: every block a point "stage<s>.block<i>", and the last 1x1 convolution, "stage3.conv".

    Args:
        in_channels: of the image.
        width: multiplier of all channels.
        afi: AFI in the blocks.
    """

    def __init__(self, *, in_channels: int, width: float, afi: AFISettings | None = None) -> None:
        if afi is not None:
            afi.require_stages(len(ROWS))
        stem = scaled(STEM, width)
        previous, depth, stages = stem, 1, []
        for s, (channels, blocks) in enumerate(ROWS, start=1):
            half = scaled(channels // 2, width)
            stage: list[tuple[Stage, Block]] = []
            for i in range(1, blocks + 2):
                convolution = partial(conv_bn, previous if i == 1 else half, kernel=1)
                first = first_layer(afi, convolution, half, stage=s, block=i, stride=2 if i == 1 else 1)
                block = DownBlock(previous, half, first) if i == 1 else ShuffleBlock(half, first)
                depth, previous = depth + 3, 2 * half
                stage.append((Stage(f"stage{s}.block{i}", depth, previous), block))
            stages.append(stage)
        last = scaled(LAST, width)
        stages[-1].append((Stage(f"stage{len(ROWS)}.conv", depth + 1, last), Plain(*conv_bn(previous, last, 1))))
        super().__init__(conv_bn(in_channels, stem, 3), stages)
        self.apply(he)
