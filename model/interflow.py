"""Interflow: backbone stages, a prediction branch on each, and the attention that fuses them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.attention import BranchAttention
from model.backbones.backbone import Backbone, Features, LayerAttention
from model.initialization import xavier
from model.methods import Method
from model.neck import TopDown


class InterflowOutput(NamedTuple):
    """Everything one forward pass says; N images, B branches, K classes."""

    logits: Tensor
    """(N, K): the sum over branches of branch_weights * branch_logits."""
    branch_logits: Tensor
    """(N, B, K): each the mean of its class maps."""
    branch_weights: Tensor
    """(N, B, K): the attention weights, repeated."""
    branch_maps: tuple[Tensor, ...]
    """B class maps, (N, K, h, w): where in the image each branch logit comes from."""
    layer_attention: tuple[LayerAttention, ...]
    """What the backbone's own attention modules, and the neck's, drew on; empty where there are none."""

    def stacked_layer_attention(self) -> Tensor:
        """The rows of `layer_attention` as (N, L, S): L blocks, S the most sources, zero-padded."""
        most = max(len(row.sources) for row in self.layer_attention)
        rows = [functional.pad(row.weights, (0, most - len(row.sources))) for row in self.layer_attention]
        return torch.stack(rows, dim=1)


class Interflow(nn.Module):
    """A backbone with a prediction branch per stage, fused by attention (Interflow, Sec. III).

    A branch is global average pooling and a linear layer. The two commute, so the layer is applied at every position
    (a 1x1 convolution gives class maps) and the mean taken after it: the same logits, and a map that sums to them.

    Args:
        backbone: gives the tapped feature maps.
        method: gives the attention.
        num_classes: K.
        shared_heads: branches of equal channels share one linear layer (the paper found separate ones worse).
        neck: "aff" or "iaff" for a top-down path before the branches.

    Raises:
        InterflowError: the method or the neck does not fit the number of stages.
    """

    def __init__(
        self,
        backbone: Backbone,
        method: Method,
        num_classes: int,
        shared_heads: bool = True,
        neck: str | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = None if neck is None else TopDown(backbone.stages, neck)
        self.method = method
        self.stages = tuple(backbone.stages)
        self.num_classes = num_classes
        self.shared_heads = shared_heads
        # One registered module per linear layer: safetensors refuses tensors that two names share.
        self.head_names = [
            f"channels{stage.channels}" if shared_heads else stage.name.replace(".", "_") for stage in self.stages
        ]
        channels = dict(zip(self.head_names, (stage.channels for stage in self.stages), strict=True))
        self.heads = nn.ModuleDict({name: nn.Conv2d(wide, num_classes, 1) for name, wide in channels.items()})
        self.heads.apply(xavier)
        self.attention = BranchAttention(method, len(self.stages), num_classes)

    def features(self, x: Tensor) -> Features:
        """What the branches see of normalised images (N, channels, height, width)."""
        features = self.backbone(x)
        return features if self.neck is None else self.neck(features)

    def forward(self, x: Tensor) -> InterflowOutput:
        """Classify normalised images, (N, channels, height, width)."""
        features = self.features(x)
        maps = tuple(self.heads[name](feature) for name, feature in zip(self.head_names, features.maps, strict=True))
        branch_logits = torch.stack([branch_map.mean(dim=(2, 3)) for branch_map in maps], dim=1)
        weights = self.attention.matrix().expand(x.shape[0], -1, -1)
        return InterflowOutput(self.attention(branch_logits), branch_logits, weights, maps, tuple(features.attention))


class Normalize(nn.Module):
    """Pixels to the network's input: scaled to 0..1, less the mean, over the deviation, channels first.

    Args:
        mean: per channel, 0..1.
        std: per channel, positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (N, height, width, channels) to float32 (N, channels, height, width)."""
        # turned round while it is bytes, with constants per plane: in onnxruntime 13 us an image of 32 x 32, and not 41
        return (images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
