"""A top-down path between backbone and branches: each stage's map, fused with what the deeper stages know."""

from collections.abc import Sequence

from torch import nn
from torch.nn import functional

from model.backbones.backbone import Features, LayerAttention, Stage
from model.contract import InterflowError
from model.initialization import he, xavier
from model.layers.aff import FUSIONS, shares


class TopDown(nn.Module):
    """Long skips, each merged by AFF (Dai et al. 2021, the "long skip" use, as in FPN and U-Net).

    ::

        M_B = F_B
        M_i = AFF(F_i, upsample(conv1x1(M_{i+1})))      i = B-1, ..., 1; bilinear, to the size of F_i

    The channels of a stage stay its own. A stage behind this neck has seen the deeper ones, so its branch says no
    longer what the network believed at that depth.

    Args:
        stages: the tapped ones, at least 2.
        fusion: "aff" or "iaff".
        reduction: r of the attention.

    Raises:
        InterflowError: fewer than 2 stages.
    """

    def __init__(self, stages: Sequence[Stage], fusion: str, reduction: int = 4) -> None:
        super().__init__()
        if fusion not in FUSIONS:
            raise InterflowError(f"neck {fusion!r} is unknown; choose one of {', '.join(FUSIONS)}, or none.")
        if len(stages) < 2:
            raise InterflowError(f"neck {fusion}: one branch has nothing to be fused with; tap 2 stages or more.")
        self.module = FUSIONS[fusion].name
        self.names = [stage.name for stage in stages]
        channels = [stage.channels for stage in stages]
        self.lateral = nn.ModuleList(nn.Conv2d(channels[i + 1], channels[i], 1) for i in range(len(stages) - 1))
        self.fusions = nn.ModuleList(FUSIONS[fusion](channels[i], reduction) for i in range(len(stages) - 1))
        self.fusions.apply(he)
        self.lateral.apply(xavier)  # no ReLU follows

    def forward(self, features: Features) -> Features:
        """Maps of any sizes to fused maps of the same sizes; adds one row of attention per fusion."""
        maps, attention = list(features.maps), list(features.attention)
        for i in reversed(range(len(self.fusions))):
            own = maps[i]
            above = functional.interpolate(
                self.lateral[i](maps[i + 1]), own.shape[2:], mode="bilinear", align_corners=False
            )
            maps[i], weight = self.fusions[i](own, above)
            block, sources = f"neck.{self.names[i]}", (self.names[i], self.names[i + 1])
            attention.append(LayerAttention(block, self.module, "share", sources, shares(weight)))
        return Features(maps, attention)
