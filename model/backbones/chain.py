"""A backbone as a chain of blocks, and what the blocks of one pass leave for one another."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn

from model.backbones.backbone import Backbone, Features, LayerAttention, Stage


class Memory:
    """What one forward pass carries beside the feature map.

    Attributes:
        block: name of the block at work.
        earlier: what earlier blocks of the same stage left for it (AFI: features; MRLA-base: keys and values).
        attention: which sources the blocks so far drew on.
    """

    def __init__(self) -> None:
        self.block = ""
        self.earlier: list[Any] = []
        self.attention: list[LayerAttention] = []

    def drew_on(self, module: str, kind: Literal["share", "gate"], sources: Sequence[str], weights: Tensor) -> None:
        """Note the attention of the block at work; weights (N, sources)."""
        self.attention.append(LayerAttention(self.block, module, kind, tuple(sources), weights))


class Block(nn.Module):
    """A link of the chain."""

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """Feature map to feature map."""
        raise NotImplementedError


class Plain(Block):
    """A module that needs no memory, as a block."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*modules)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """As the modules, one after the other."""
        return self.layers(x)


class Chain(Backbone):
    """A stem and then blocks in stages; every block's map can be tapped, and memory is emptied at each stage.

    Args:
        stem: from the image to the first block's input.
        stages: each a list of blocks with the point that their map is.
    """

    def __init__(self, stem: nn.Module, stages: Sequence[Sequence[tuple[Stage, Block]]]) -> None:
        super().__init__(
            [replace(point, end=i == len(stage)) for stage in stages for i, (point, _) in enumerate(stage, start=1)]
        )
        self.stem = stem
        self.blocks = nn.ModuleList(block for stage in stages for _, block in stage)
        self.first = {stage[0][0].name for stage in stages}

    def keep(self) -> None:
        """As `Backbone.keep`."""
        del self.blocks[len(self.points) :]

    def forward(self, x: Tensor) -> Features:
        """As `Backbone.forward`."""
        memory, maps, tapped = Memory(), [], {stage.name for stage in self.stages}
        x = self.stem(x)
        for point, block in zip(self.points, self.blocks, strict=True):
            memory.block = point.name
            if point.name in self.first:
                memory.earlier = []
            x = block(x, memory)
            if point.name in tapped:
                maps.append(self.as_map(x))
        return Features(maps, memory.attention)

    def as_map(self, x: Tensor) -> Tensor:
        """What a block hands on, as a feature map (N, channels, h, w)."""
        return x
