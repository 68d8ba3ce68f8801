"""Residual networks: ResNet and ResNeXt for CIFAR and ImageNet, plain or with AFI, AFF, MRLA or SE."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

from torch import Tensor, nn

from model.backbones.afi import AFISettings, FirstLayer, first_layer
from model.backbones.backbone import Stage
from model.backbones.chain import Block, Chain, Memory
from model.contract import InterflowError
from model.initialization import he
from model.layers.aff import AFF, FUSIONS, IAFF, Fusion, shares
from model.layers.convolution import conv_bn, scaled
from model.layers.mrla import MRLABase, MRLALight
from model.options import require_count, require_flag, require_rate, require_stages

RESNET50, RESNET101, RESNET152 = (3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3)
"""Blocks of the four stages."""
SHORTCUT, BRANCH = "shortcut", "residual branch"


class ResidualBlock(Block):
    """relu(branch(x) + shortcut(x)), the branch being a first layer and the rest.

    Args:
        first: convolution, batch norm, ReLU, and what AFI adds to them.
        rest: to the branch's output, after its last batch norm.
        shortcut: to the same shape.
        fuse: AFF or iAFF instead of the addition.
        mrla: layer attention on the block's output.
    """

    def __init__(
        self,
        first: FirstLayer,
        rest: nn.Module,
        shortcut: nn.Module,
        *,
        fuse: AFF | IAFF | None = None,
        mrla: "LightRetrieval | BaseRetrieval | None" = None,
    ) -> None:
        super().__init__()
        self.first, self.rest, self.shortcut = first, rest, shortcut
        self.fuse, self.mrla = fuse, mrla

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """As `Block.forward`."""
        branch, skip = self.rest(self.first(x, memory)), self.shortcut(x)
        out = merge(self.fuse, branch, skip, memory).relu()
        return out if self.mrla is None else self.mrla(out, skip, memory)


def merge(fuse: AFF | IAFF | None, branch: Tensor, skip: Tensor, memory: Memory) -> Tensor:
    """Add branch and shortcut, or fuse them and note how they were divided (AFF, the "short skip" use)."""
    if fuse is None:
        return branch + skip
    fused, weight = fuse(branch, skip)
    memory.drew_on(fuse.name, "share", (BRANCH, SHORTCUT), shares(weight))
    return fused


@dataclass(frozen=True)
class FusionSettings:
    """Where a network adds by AFF.

    Attributes:
        kind: "aff" or "iaff".
        stages: those whose additions are replaced, counted from 1.
        reduction: r of the attention.
    """

    kind: Fusion
    stages: Sequence[int]
    reduction: int

    def __post_init__(self) -> None:
        require_count("reduction", self.reduction)

    def module(self, stage: int, channels: int) -> AFF | IAFF | None:
        """For one block of a stage; None where it adds."""
        return FUSIONS[self.kind](channels, self.reduction) if stage in self.stages else None


class LightRetrieval(nn.Module):
    """MRLA-light behind a block: y = x + DropPath(BN(O)), with the block's shortcut for o_prev.

    Args:
        channels: of the block's output.
        dim_per_head: d.
        drop_path: chance that an image skips it in training.
    """

    def __init__(self, channels: int, dim_per_head: int, drop_path: float) -> None:
        super().__init__()
        self.layer = MRLALight(channels, dim_per_head)
        self.norm = nn.BatchNorm2d(channels)
        self.drop_path = _drop_path(drop_path)

    def forward(self, x: Tensor, skip: Tensor, memory: Memory) -> Tensor:
        """Both (N, C, h, w)."""
        drawn, gate = self.layer(x, skip)
        memory.drew_on("MRLA-light", "gate", (memory.block,), gate.mean(dim=1, keepdim=True))
        return x + self.drop_path(self.norm(drawn))


class BaseRetrieval(nn.Module):
    """MRLA-base behind a block: y = x + DropPath(relu(BN(O))), O from this layer and all earlier ones of the stage.

    Args:
        channels: of the block's output.
        dim_per_head: d.
        drop_path: chance that an image skips it in training.
        relu: whether there is that ReLU; the authors' two files differ.
    """

    def __init__(self, channels: int, dim_per_head: int, drop_path: float, relu: bool = True) -> None:
        super().__init__()
        require_flag("relu", relu)
        self.layer = MRLABase(channels, dim_per_head)
        self.norm = nn.BatchNorm2d(channels)
        self.activation = nn.ReLU(inplace=True) if relu else nn.Identity()
        self.drop_path = _drop_path(drop_path)

    def forward(self, x: Tensor, skip: Tensor, memory: Memory) -> Tensor:
        """Both (N, C, h, w); the shortcut plays no part."""
        drawn, attention, mine = self.layer(x, [left for _, left in memory.earlier])
        memory.earlier = [*memory.earlier, (memory.block, mine)]
        memory.drew_on("MRLA-base", "share", [block for block, _ in memory.earlier], attention.mean(dim=1))
        return x + self.drop_path(self.activation(self.norm(drawn)))


def _drop_path(rate: float) -> nn.Module:
    require_rate("drop_path", rate)
    from timm import layers  # noqa: PLC0415 - takes seconds, and only MRLA needs it

    return layers.DropPath(rate)


class Row(NamedTuple):
    """One stage: channels of its 3x3 convolutions, of its output, blocks, and the stride of its first block."""

    inner: int
    out: int
    blocks: int
    stride: int


@dataclass(frozen=True)
class Layout:
    """What tells one residual network from another.

    Attributes:
        rows: the stages.
        stem: "3x3" or "1x1" at full size (CIFAR); "7x7" or "deep" (three 3x3) at stride 2, with pooling (ImageNet).
        stem_channels: of the stem's output; a deep stem has half of them before.
        bottleneck: 1x1, 3x3, 1x1 with the stride in the 3x3, else 3x3, 3x3.
        groups: of the bottleneck's 3x3 convolution.
        pooled_shortcut: a shortcut that changes size pools and then convolves 1x1, else it convolves with stride.
    """

    rows: tuple[Row, ...]
    stem: Literal["3x3", "1x1", "7x7", "deep"] = "3x3"
    stem_channels: int = 16
    bottleneck: bool = False
    groups: int = 1
    pooled_shortcut: bool = False


class ResNet(Chain):
    """A residual network, every block a point "stage<s>.block<i>".

    Args:
        in_channels: of the image.
        width: multiplier of all channels.
        layout: which network.
        afi: AFI in the blocks.
        fusion: AFF for the additions.
        mrla: makes the layer attention behind a block of so many output channels.
        se: squeeze-and-excitation on the branch's output.
        zero_init: the last batch norm of each branch starts at zero, so that blocks start as identities.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        width: float,
        layout: Layout,
        afi: AFISettings | None = None,
        fusion: FusionSettings | None = None,
        mrla: Callable[[int], LightRetrieval | BaseRetrieval] | None = None,
        se: bool = False,
        zero_init: bool = False,
    ) -> None:
        require_flag("se", se)
        require_flag("zero_init", zero_init)
        if afi is not None:
            afi.require_stages(len(layout.rows))
        if fusion is not None:
            require_stages(fusion.stages, len(layout.rows))
        stem = scaled(layout.stem_channels, width)
        previous, stages = stem, []
        depth = 3 if layout.stem == "deep" else 1
        for s, row in enumerate(layout.rows, start=1):
            inner, out = (scaled(channels, width, layout.groups) for channels in (row.inner, row.out))
            stage: list[tuple[Stage, Block]] = []
            for i in range(1, row.blocks + 1):
                stride = row.stride if i == 1 else 1
                if layout.bottleneck:
                    convolution, later_stride = partial(conv_bn, previous, kernel=1), stride
                else:
                    convolution, later_stride = partial(conv_bn, previous, kernel=3, stride=stride), 1
                first = first_layer(afi, convolution, inner, stage=s, block=i, stride=later_stride)
                if layout.bottleneck:
                    rest = [
                        conv_bn(first.out_channels, inner, 3, stride=stride, groups=layout.groups),
                        conv_bn(inner, out, 1, relu=False),
                    ]
                else:
                    rest = [conv_bn(first.out_channels, out, 3, relu=False)]
                if zero_init:
                    nn.init.zeros_(rest[-1].get_parameter("1.weight"))
                block = ResidualBlock(
                    first,
                    nn.Sequential(*rest, *_squeeze_excite(se, out)),
                    _shortcut(previous, out, stride, pooled=layout.pooled_shortcut),
                    fuse=None if fusion is None else fusion.module(s, out),
                    mrla=None if mrla is None else mrla(out),
                )
                depth, previous = depth + (3 if layout.bottleneck else 2), out
                stage.append((Stage(f"stage{s}.block{i}", depth, out), block))
            stages.append(stage)
        super().__init__(_stem(layout.stem, in_channels, stem), stages)
        self.apply(he)


def _stem(kind: str, in_channels: int, channels: int) -> nn.Module:
    half = max(1, channels // 2)
    return {
        "1x1": lambda: conv_bn(in_channels, channels, 1),
        "3x3": lambda: conv_bn(in_channels, channels, 3),
        "7x7": lambda: nn.Sequential(conv_bn(in_channels, channels, 7, stride=2), nn.MaxPool2d(3, 2, 1)),
        "deep": lambda: nn.Sequential(
            conv_bn(in_channels, half, 3, stride=2),
            conv_bn(half, half, 3),
            conv_bn(half, channels, 3),
            nn.MaxPool2d(3, 2, 1),
        ),
    }[kind]()


def _shortcut(in_channels: int, out_channels: int, stride: int, *, pooled: bool) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    if not pooled:
        return conv_bn(in_channels, out_channels, 1, stride=stride, relu=False)
    pool = [nn.AvgPool2d(stride, ceil_mode=True)] if stride > 1 else []
    return nn.Sequential(*pool, conv_bn(in_channels, out_channels, 1, relu=False))


def _squeeze_excite(wanted: bool, channels: int) -> list[nn.Module]:
    if not wanted:
        return []
    from timm import layers  # noqa: PLC0415 - takes seconds, and only SE networks need it

    return [layers.SqueezeExcite(channels, rd_channels=max(1, channels // 16), bias=False)]


def cifar_resnet(layers: int) -> Layout:
    """ResNet-(6n+2): widths 16, 32, 64, 1x1 shortcuts at the two width changes (He et al. 2016, Sec. 4.2)."""
    blocks = (layers - 2) // 6
    return Layout((Row(16, 16, blocks, 1), Row(32, 32, blocks, 2), Row(64, 64, blocks, 2)))


def cifar_resnext(layers: int, stem: Literal["1x1", "3x3"] = "1x1", *, pooled: bool = False) -> Layout:
    """ResNeXt-(9n+2) 32x4d for CIFAR: expansion 2; with a 1x1 stem ResNeXt-29 as kuangliu/pytorch-cifar has it."""
    blocks = (layers - 2) // 9
    rows = (Row(128, 256, blocks, 1), Row(256, 512, blocks, 2), Row(512, 1024, blocks, 2))
    return Layout(rows, stem, 64, bottleneck=True, groups=32, pooled_shortcut=pooled)


def imagenet_resnet(blocks: Sequence[int], stem: Literal["7x7", "deep"] = "7x7", *, pooled: bool = False) -> Layout:
    """ResNet-50, 101, 152 by the blocks of their four stages; torchvision's layout."""
    rows = tuple(Row(64 * 2**s, 256 * 2**s, n, 1 if s == 0 else 2) for s, n in enumerate(blocks))
    return Layout(rows, stem, 64, bottleneck=True, pooled_shortcut=pooled)


def imagenet_resnext50() -> Layout:
    """ResNeXt-50 32x4d with the AFF authors' stem (64-64-128) and pooled shortcuts."""
    rows = tuple(Row(128 * 2**s, 256 * 2**s, n, 1 if s == 0 else 2) for s, n in enumerate(RESNET50))
    return Layout(rows, "deep", 128, bottleneck=True, groups=32, pooled_shortcut=True)


def with_fusion(layout: Layout, kind: Fusion, *, stages: Sequence[int], reduction: int) -> Callable[..., ResNet]:
    """A builder of that network with AFF or iAFF for the additions; its options, and their defaults.

    Args:
        layout: which network.
        kind: "aff" or "iaff".
        stages: those whose additions are replaced, counted from 1.
        reduction: r of the attention.
    """
    default_stages, default_reduction = tuple(stages), reduction

    def build(
        *,
        in_channels: int,
        width: float,
        stages: Sequence[int] = default_stages,
        reduction: int = default_reduction,
        zero_init: bool = False,
    ) -> ResNet:
        fusion = FusionSettings(kind, stages, reduction)
        return ResNet(in_channels=in_channels, width=width, layout=layout, fusion=fusion, zero_init=zero_init)

    return build


def with_mrla_light(blocks: Sequence[int]) -> Callable[..., ResNet]:
    """A builder of ResNet with MRLA-light behind every block; 7x7 stem, as in the authors' file."""

    def build(
        *,
        in_channels: int,
        width: float,
        dim_per_head: int = 32,
        drop_path: float = 0.2,
        stem: Literal["7x7", "deep"] = "7x7",
    ) -> ResNet:
        return ResNet(
            in_channels=in_channels,
            width=width,
            layout=imagenet_resnet(blocks, _choose_stem(stem)),
            mrla=lambda channels: LightRetrieval(channels, dim_per_head, drop_path),
            zero_init=True,
        )

    return build


def with_mrla_base(blocks: Sequence[int], stem: Literal["7x7", "deep"]) -> Callable[..., ResNet]:
    """A builder of ResNet with MRLA-base behind every block, with one stem or the other: the authors have both."""
    default_stem = stem

    def build(
        *,
        in_channels: int,
        width: float,
        dim_per_head: int = 16,
        drop_path: float = 0.2,
        relu: bool = True,
        stem: Literal["7x7", "deep"] = default_stem,
    ) -> ResNet:
        return ResNet(
            in_channels=in_channels,
            width=width,
            layout=imagenet_resnet(blocks, _choose_stem(stem)),
            mrla=lambda channels: BaseRetrieval(channels, dim_per_head, drop_path, relu),
            zero_init=True,
        )

    return build


def _choose_stem(stem: Literal["7x7", "deep"]) -> Literal["7x7", "deep"]:
    if stem not in ("7x7", "deep"):
        raise InterflowError(f"stem {stem!r}: choose 7x7 or deep.")
    return stem
