"""VGG-16's convolutions, as Interflow uses them (Interflow, Sec. III-D)."""

from collections.abc import Sequence

from torch import Tensor, nn

from model.backbones.stage import Stage
from model.contract import InterflowError
from model.initialization import xavier

BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of the 13 convolutions. The first of blocks 2 to 5 has stride 2, in the place of the pooling before it."""

DEPTHS = range(4, 14)
"""The paper's Table I."""

TAPS = {4: (7, 9, 11, 13), 7: (7, 8, 9, 10, 11, 12, 13)}
"""Tapped convolutions by number of branches: the paper's first stage ends at convolution 7."""


class VGG16(nn.Module):
    """The first `depth` convolutions of VGG-16: 3x3, batch norm, ReLU; no pooling, no hidden linear layer.

    A 32x32 image runs at 32, 16, 8, 4, 2 pixels. The layers are numbered from 1.

    Args:
        in_channels: of the image.
        depth: convolutions kept, 4 to 13.
        width: multiplier of every layer's channels.
        branches: how many stages the method asks for, 1, 4 or 7; 1 taps the last convolution.
        taps: convolutions to tap instead, ascending; the last must be `depth`.

    Raises:
        InterflowError: a depth, width or tap that this network does not have.
    """

    def __init__(
        self, *, in_channels: int, depth: int | None, width: float, branches: int, taps: Sequence[int] | None
    ) -> None:
        super().__init__()
        self.depth = DEPTHS[-1] if depth is None else depth
        if self.depth not in DEPTHS:
            raise InterflowError(f"depth {self.depth}: vgg16 has {DEPTHS[0]} to {DEPTHS[-1]} convolutions.")
        if not 0 < width < float("inf"):
            raise InterflowError(f"width {width}: expected a positive multiplier of the channels, such as 0.5.")
        self.taps = self._choose_taps(branches, taps)

        layout = [
            (channels, block > 0 and i == 0) for block, row in enumerate(BLOCKS) for i, channels in enumerate(row)
        ]
        self.convolutions = nn.ModuleList()
        self.stages: list[Stage] = []
        channels = in_channels
        for layer, (full_width, strided) in enumerate(layout[: self.depth], start=1):
            previous, channels = channels, max(1, round(full_width * width))
            self.convolutions.append(
                nn.Sequential(
                    nn.Conv2d(previous, channels, 3, stride=2 if strided else 1, padding=1, bias=False),
                    nn.BatchNorm2d(channels),
                    nn.ReLU(inplace=True),
                )
            )
            if layer in self.taps:
                self.stages.append(Stage(f"conv{layer}", layer, channels))
        self.apply(xavier)

    def _choose_taps(self, branches: int, taps: Sequence[int] | None) -> tuple[int, ...]:
        if taps is None:
            taps = (self.depth,) if branches == 1 else TAPS[branches]
            if taps[-1] != self.depth:
                raise InterflowError(
                    f"{branches} branches tap convolutions {', '.join(map(str, taps))}, but the depth is {self.depth}; "
                    f"choose the taps (up to {self.depth}, the last one {self.depth}), or depth {DEPTHS[-1]}."
                )
        elif not taps or list(taps) != sorted(set(taps)) or taps[0] < 1 or taps[-1] != self.depth:
            raise InterflowError(
                f"taps {', '.join(map(str, taps)) or '(none)'}: expected convolutions in ascending order, from 1 up, "
                f"ending with the last one ({self.depth}): what lies behind the last tap would learn nothing."
            )
        return tuple(taps)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Feature maps of the tapped convolutions, (N, channels, h, w) each, from shallow to deep."""
        features: list[Tensor] = []
        for layer, convolution in enumerate(self.convolutions, start=1):
            x = convolution(x)
            if layer in self.taps:
                features.append(x)
        return features
