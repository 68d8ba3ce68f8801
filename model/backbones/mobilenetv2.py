"""MobileNetV2 for CIFAR, as kuangliu/pytorch-cifar has it, plain or with AFI (AFINets, Sec. 4.1)."""

from functools import partial

from torch import Tensor, nn

from model.backbones.afi import AFISettings, FirstLayer, first_layer
from model.backbones.backbone import Stage
from model.backbones.chain import Block, Chain, Memory, Plain
from model.initialization import he
from model.layers.convolution import conv_bn, scaled

ROWS = (
    # expansion, channels, blocks, stride
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STEM, LAST = 32, 1280


class InvertedResidual(Block):
    """1x1 expansion, 3x3 by groups, 1x1 projection; a shortcut, convolved where the channels change, at stride 1.

    Without AFI the 3x3 is depthwise. The -B networks feed it two inputs per output, in as many groups as outputs.

    Args:
        in_channels: of x.
        expanded: C, of the 3x3 convolution.
        out_channels: of the output.
        stride: of the 3x3 convolution.
        first: the expansion.
    """

    def __init__(self, in_channels: int, expanded: int, out_channels: int, stride: int, first: FirstLayer) -> None:
        super().__init__()
        self.first = first
        spatial = min(expanded, first.out_channels)
        self.rest = nn.Sequential(
            conv_bn(first.out_channels, spatial, 3, stride=stride, groups=spatial),
            conv_bn(spatial, out_channels, 1, relu=False),
        )
        self.shortcut: nn.Module | None = None
        if stride == 1:
            same = in_channels == out_channels
            self.shortcut = nn.Identity() if same else conv_bn(in_channels, out_channels, 1, relu=False)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """As `Block.forward`."""
        out = self.rest(self.first(x, memory))
        return out if self.shortcut is None else out + self.shortcut(x)


class MobileNetV2(Chain):
    """MobileNetV2: every block a point "stage<s>.block<i>", and the last 1x1 convolution, "stage7.conv".

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
        for s, (expansion, channels, blocks, row_stride) in enumerate(ROWS, start=1):
            out = scaled(channels, width)
            stage: list[tuple[Stage, Block]] = []
            for i in range(1, blocks + 1):
                stride, expanded = row_stride if i == 1 else 1, expansion * previous
                convolution = partial(conv_bn, previous, kernel=1)
                first = first_layer(afi, convolution, expanded, stage=s, block=i, stride=stride, later=expansion * out)
                block = InvertedResidual(previous, expanded, out, stride, first)
                depth, previous = depth + 3, out
                stage.append((Stage(f"stage{s}.block{i}", depth, out), block))
            stages.append(stage)
        last = scaled(LAST, width)
        stages[-1].append((Stage(f"stage{len(ROWS)}.conv", depth + 1, last), Plain(*conv_bn(previous, last, 1))))
        super().__init__(conv_bn(in_channels, stem, 3), stages)
        self.apply(he)
