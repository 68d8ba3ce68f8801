"""Attentional feature fusion (Dai et al., "Attentional Feature Fusion", 2021): MS-CAM, AFF, iAFF.

Notation: u (B, C, H, W). Each layer returns its output and the weight w (B, C, H, W), in 0..1, that it used.
"""

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.contract import InterflowError
from model.layers.convolution import conv_bn


class MultiScaleAttention(nn.Module):
    """The weight of MS-CAM: local context at every position, and global context.

    ::

        L(u) = BN(P2 relu(BN(P1 u)))           1x1 convolutions with bias, C to C/r to C, at every position
        G(u) = BN(Q2 relu(BN(Q1 mean(u))))     the same on the spatial mean, with weights of its own
        w(u) = sigmoid(L(u) + G(u))            (B, C, H, W)

    Args:
        channels: C.
        reduction: r; C/r is floored, and at least 1.
    """

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.local_context = _context(channels, hidden)
        self.global_context = _context(channels, hidden)

    def forward(self, u: Tensor) -> Tensor:
        """w(u).

        Raises:
            InterflowError: one image while training; batch norm of its global context would have one value a channel.
                Where several processes train together it is over all their images, and one may have one or none.
        """
        if self.training and u.shape[0] == 1 and not (dist.is_available() and dist.is_initialized()):
            raise InterflowError("AFF and MS-CAM train on batches of 2 images or more: raise the batch size.")
        return (self.local_context(u) + self.global_context(u.mean(dim=(2, 3), keepdim=True))).sigmoid()


def _context(channels: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, hidden, 1),
        nn.BatchNorm2d(hidden),
        nn.ReLU(inplace=True),
        nn.Conv2d(hidden, channels, 1),
        nn.BatchNorm2d(channels),
    )


class MSCAM(nn.Module):
    """x * w(x): channel attention on one input, at two scales. Arguments as `MultiScaleAttention`."""

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        self.attention = MultiScaleAttention(channels, reduction)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W) to the output of that shape, and w."""
        weight = self.attention(x)
        return x * weight, weight


class AFF(nn.Module):
    """Two maps fused: 2 x w + 2 y (1 - w), with w = w(x + y).

    At w = 1/2 this is x + y, the addition that it replaces; hence the factor 2, which the authors' code has. x is the
    learned branch, y the skip branch. Arguments as `MultiScaleAttention`.
    """

    name = "AFF"

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        self.attention = MultiScaleAttention(channels, reduction)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x, y (B, C, H, W) to the fused map of that shape, and w, the part of x."""
        weight = self.attention(x + y)
        return 2 * x * weight + 2 * y * (1 - weight), weight


class IAFF(nn.Module):
    """Iterative AFF: the first fusion only says where the second one looks.

    ::

        w'  = w_1(x + y)       u   = x w' + y (1 - w')
        w'' = w_2(u)           out = x w'' + y (1 - w'')

    Without AFF's factor 2, and with four branches of weights: a third-party port calls the first global branch twice;
    this follows the authors. Arguments as `MultiScaleAttention`.
    """

    name = "iAFF"

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        self.first = MultiScaleAttention(channels, reduction)
        self.second = MultiScaleAttention(channels, reduction)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x, y (B, C, H, W) to the fused map of that shape, and w'', the part of x."""
        weight = self.first(x + y)
        weight = self.second(x * weight + y * (1 - weight))
        return x * weight + y * (1 - weight), weight


def shares(weight: Tensor) -> Tensor:
    """How the weights w (B, C, H, W) of a fusion divide between its two inputs, on average: (B, 2), rows sum to 1."""
    part = weight.mean(dim=(1, 2, 3))
    return torch.stack([part, 1 - part], dim=1)


Fusion = Literal["aff", "iaff"]
FUSIONS: dict[str, type[AFF] | type[IAFF]] = {"aff": AFF, "iaff": IAFF}


class InceptionAFF(nn.Module):
    """AFF within one layer: a 3x3 and a 5x5 convolution of the same map, fused instead of added or concatenated.

    The abstract's "same layer" use; the repositories hold no code for it. Kernels as in InceptionNets.

    Args:
        in_channels: of the map.
        out_channels: of both branches and of the output.
        fusion: "aff" or "iaff".
        reduction: r of the attention.
    """

    def __init__(self, in_channels: int, out_channels: int, fusion: Fusion = "aff", reduction: int = 4) -> None:
        super().__init__()
        self.narrow = conv_bn(in_channels, out_channels, 3)
        self.wide = conv_bn(in_channels, out_channels, 5)
        self.fuse = FUSIONS[fusion](out_channels, reduction)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, in_channels, H, W) to (B, out_channels, H, W), and w, the part of the 3x3 branch."""
        return self.fuse(self.narrow(x), self.wide(x))
