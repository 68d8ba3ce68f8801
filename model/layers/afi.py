"""Attentive feature integration (AFINets, Sec. 3.1): earlier features of a stage, fused channel by channel."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class AFI(nn.Module):
    """Softmax-weighted sum of N features of one shape (AFINets, Eq. 1 and 2).

    ::

        z_i = mean of X_i over space                    (B, D)
        s_i = W2 relu(W1 z_i)                           (B, D), the same W1 (D/r, D) and W2 (D, D/r) for all i
        a_i = exp(s_i) / sum_j exp(s_j)                 (B, D), over the features, per image and channel
        R   = sum_i a_i * X_i                           (B, D, H, W)

    Every channel of R is a convex combination of the features' channels. No bias and no batch norm: the published
    parameter counts have none.

    Args:
        channels: D, of every feature.
        reduction: r; D/r is floored, and at least 1.
    """

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.squeeze = nn.Linear(channels, hidden, bias=False)
        self.excite = nn.Linear(hidden, channels, bias=False)

    def scores(self, pooled: Tensor) -> Tensor:
        """s (Eq. 2): spatial means (..., D) to scores (..., D)."""
        return self.excite(self.squeeze(pooled).relu())

    def forward(self, features: Sequence[Tensor], pooled: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Fuse.

        Args:
            features: N >= 1 maps (B, D, H, W).
            pooled: their spatial means (B, D), where they are known already: every feature need be pooled only once.

        Returns:
            R (B, D, H, W) and the weights a (N, B, D).
        """
        if pooled is None:
            pooled = [feature.mean(dim=(2, 3)) for feature in features]
        weights = self.scores(torch.stack(list(pooled))).softmax(dim=0)
        parts = [weight * feature for weight, feature in zip(weights[..., None, None].unbind(), features, strict=True)]
        return sum(parts[1:], parts[0]), weights
