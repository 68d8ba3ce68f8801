"""Multi-head recurrent layer attention (Fang et al., "Cross-Layer Retrospective Retrieving via Layer Attention", 2023).

x (B, C, H, W) is the output of a block, after its last ReLU. H heads of d = C/H channels, contiguous groups.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.contract import InterflowError
from model.options import require_count


def kernel_length(channels: int) -> int:
    """Of the convolution over the channels: t = floor((log2 C + 1) / 2), made odd. 3 for 16..64, 5 for 128..1024."""
    t = int((math.log2(channels) + 1) / 2)
    return t if t % 2 else t + 1


class Projections(nn.Module):
    """Query, key and value of one layer; 9 C + 2 ks parameters, none shared with other layers.

    ::

        q = conv1d(mean(x); wq)    k = conv1d(mean(x); wk)    (B, C): one kernel slid over the channels
        V = depthwise 3x3 (x; wv)                             (B, C, H, W)

    Args:
        channels: C.
        dim_per_head: d; divides C.
        kernel: ks, odd; `kernel_length(channels)` where None.

    Raises:
        InterflowError: d is no whole number from 1 or does not divide C, or ks is even.
    """

    def __init__(self, channels: int, dim_per_head: int, kernel: int | None = None) -> None:
        super().__init__()
        require_count("dim_per_head", dim_per_head)
        if channels % dim_per_head:
            raise InterflowError(f"MRLA has heads of {dim_per_head} channels, which do not divide {channels}.")
        kernel = kernel_length(channels) if kernel is None else kernel
        if kernel % 2 == 0:
            raise InterflowError(f"MRLA kernel length {kernel}: expected an odd number, so that it has a middle.")
        self.heads, self.scale = channels // dim_per_head, 1 / math.sqrt(dim_per_head)
        self.query = nn.Conv1d(1, 1, kernel, padding=kernel // 2, bias=False)
        self.key = nn.Conv1d(1, 1, kernel, padding=kernel // 2, bias=False)
        self.value = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x to q and k (B, heads, d) and V (B, heads, d, H, W)."""
        pooled = x.mean(dim=(2, 3)).unsqueeze(1)
        query, key = (conv(pooled).squeeze(1).unflatten(1, (self.heads, -1)) for conv in (self.query, self.key))
        return query, key, self.value(x).unflatten(1, (self.heads, -1))


class MRLALight(nn.Module):
    """MRLA-light: no memory of earlier layers but the residual stream.

    ::

        A   = sigmoid(<q, k> / sqrt(d)) * V     one scalar per head and image
        O_t = A + lambda * o_prev               lambda: (C), one per channel, drawn from N(0, 1)

    The paper's recursion has the previous layer's output for o_prev; the authors' ResNet passes the shortcut tensor of
    the same block.

    Args:
        channels: C.
        dim_per_head: d.
        gelu: GELU on V, as the transformer variant has it.
    """

    def __init__(self, channels: int, dim_per_head: int = 32, *, gelu: bool = False) -> None:
        super().__init__()
        self.projections = Projections(channels, dim_per_head)
        self.activation = nn.GELU() if gelu else nn.Identity()
        self.lam = nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor, o_prev: Tensor) -> tuple[Tensor, Tensor]:
        """x, o_prev (B, C, H, W) to O_t of that shape, and the gates (B, heads), in 0..1."""
        query, key, value = self.projections(x)
        gate = ((query * key).sum(dim=2) * self.projections.scale).sigmoid()
        drawn = (gate[:, :, None, None, None] * self.activation(value)).flatten(1, 2)
        return drawn + self.lam[:, None, None] * o_prev, gate


class KeyValue(NamedTuple):
    """What a layer leaves for later ones of its stage: key (B, heads, d) and value (B, heads, d, H, W)."""

    key: Tensor
    value: Tensor


class MRLABase(nn.Module):
    """MRLA-base: softmax over the layers 1..t of the stage, per head.

    ::

        a_j = softmax over j = 1..t of <q_t, k_j> / sqrt(d)     (B, heads, t)
        O_t = sum_j a_j V_j                                     per head

    Args:
        channels: C.
        dim_per_head: d.
    """

    def __init__(self, channels: int, dim_per_head: int = 16) -> None:
        super().__init__()
        self.projections = Projections(channels, dim_per_head)

    def forward(self, x: Tensor, earlier: Sequence[KeyValue]) -> tuple[Tensor, Tensor, KeyValue]:
        """x (B, C, H, W) to O_t of that shape, the attention a (B, heads, t), and what layer t leaves for later ones.

        Args:
            x: the layer's input.
            earlier: keys and values of layers 1..t-1.
        """
        query, key, value = self.projections(x)
        mine = KeyValue(key, value)
        layers = [*earlier, mine]
        scores = torch.stack([(query * layer.key).sum(dim=2) for layer in layers], dim=2)
        attention = (scores * self.projections.scale).softmax(dim=2)
        shares = attention[..., None, None, None].unbind(dim=2)
        parts = [share * layer.value for share, layer in zip(shares, layers, strict=True)]
        return sum(parts[1:], parts[0]).flatten(1, 2), attention, mine
