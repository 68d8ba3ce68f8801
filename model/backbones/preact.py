"""The pre-activation ResNet of the AFF paper for CIFAR, four times as wide as usual."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from model.backbones.backbone import Stage
from model.backbones.chain import Block, Chain, Memory
from model.backbones.resnet import FusionSettings, merge
from model.initialization import he
from model.layers.aff import AFF, IAFF, Fusion
from model.layers.convolution import scaled
from model.options import require_count, require_stages

WIDTHS = (16, 32, 64)


class PreActBlock(Block):
    """conv(relu(BN(conv(relu(BN(x)))))), added to or fused with the shortcut; no ReLU behind.

    Where the width changes, the shortcut is 2x2 mean pooling and a 1x1 convolution, of the activated input (as in He
    et al. 2016b).

    Args:
        in_channels: of x.
        out_channels: of both convolutions.
        stride: of the first convolution, and of the pooling.
        fuse: AFF or iAFF instead of the addition.
        last: the network's last block, whose output is normalised and activated.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int, fuse: AFF | IAFF | None, last: bool
    ) -> None:
        super().__init__()
        self.activate = nn.Sequential(nn.BatchNorm2d(in_channels), nn.ReLU(inplace=False))
        self.branch = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False),
        )
        self.shortcut: nn.Module | None = None
        if in_channels != out_channels:
            pool = [nn.AvgPool2d(stride, ceil_mode=True)] if stride > 1 else []
            self.shortcut = nn.Sequential(*pool, nn.Conv2d(in_channels, out_channels, 1, bias=False))
        self.fuse = fuse
        self.last = nn.Sequential(nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)) if last else nn.Identity()

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """As `Block.forward`."""
        activated = self.activate(x)
        skip = x if self.shortcut is None else self.shortcut(activated)
        return self.last(merge(self.fuse, self.branch(activated), skip, memory))


class PreActResNet(Chain):
    """Pre-activation ResNet-(6n+2) for CIFAR (Dai et al. 2021, Sec. 5.1).

    Args:
        in_channels: of the image.
        width: multiplier of all channels.
        layers: 6n + 2.
        times: multiplier of the widths 16, 32, 64.
        fusion: AFF for the additions.
    """

    def __init__(
        self, *, in_channels: int, width: float, layers: int, times: int, fusion: FusionSettings | None = None
    ) -> None:
        require_count("times", times)
        if fusion is not None:
            require_stages(fusion.stages, len(WIDTHS))
        previous, depth, stages = scaled(WIDTHS[0] * times, width), 1, []
        stem = nn.Sequential(
            nn.BatchNorm2d(in_channels, affine=False), nn.Conv2d(in_channels, previous, 3, 1, 1, bias=False)
        )
        blocks = (layers - 2) // 6
        for s, channels in enumerate(WIDTHS, start=1):
            out, stage = scaled(channels * times, width), []
            for i in range(1, blocks + 1):
                block = PreActBlock(
                    previous,
                    out,
                    stride=2 if s > 1 and i == 1 else 1,
                    fuse=None if fusion is None else fusion.module(s, out),
                    last=s == len(WIDTHS) and i == blocks,
                )
                depth, previous = depth + 2, out
                stage.append((Stage(f"stage{s}.block{i}", depth, out), block))
            stages.append(stage)
        super().__init__(stem, stages)
        self.apply(he)


def preact_with_fusion(kind: Fusion, layers: int) -> Callable[..., PreActResNet]:
    """A builder of that network with AFF or iAFF for all additions."""

    def build(
        *,
        in_channels: int,
        width: float,
        stages: Sequence[int] = (1, 2, 3),
        reduction: int = 4,
        times: int = 4,
    ) -> PreActResNet:
        fusion = FusionSettings(kind, stages, reduction)
        return PreActResNet(in_channels=in_channels, width=width, layers=layers, times=times, fusion=fusion)

    return build
