"""Convolution and batch norm, as all backbones use them."""

from torch import nn


def conv_bn(
    in_channels: int, out_channels: int, kernel: int = 3, *, stride: int = 1, groups: int = 1, relu: bool = True
) -> nn.Sequential:
    """Convolution without bias, padded to keep the size at stride 1; batch norm; ReLU unless told otherwise."""
    layers = [
        nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
    ]
    return nn.Sequential(*layers, nn.ReLU(inplace=True)) if relu else nn.Sequential(*layers)


def scaled(channels: int, width: float, multiple: int = 1) -> int:
    """`channels` times `width`, as a multiple of `multiple`, at least that."""
    return multiple * max(1, round(channels * width / multiple))
