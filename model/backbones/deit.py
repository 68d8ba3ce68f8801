"""DeiT with MRLA behind every transformer block; its branches see the patch tokens as maps.

Around `MRLALight` and `MRLABase`, from the authors' transformer files: layer norm on the tokens that enter (light: also
on o_prev), GELU on V in the light form, heads of 16 channels, the class token left out of the attention, and in the
base form lists that begin anew every 4 blocks.
"""

import torch
from torch import Tensor, nn

from model.backbones.backbone import Stage
from model.backbones.chain import Block, Chain, Memory
from model.contract import InterflowError
from model.layers.convolution import scaled
from model.layers.mrla import MRLABase, MRLALight
from model.options import require_rate

PATCH, HEAD, BLOCKS, STAGE = 16, 64, 12, 4
"""Pixels a side of a patch, channels of a self-attention head, transformer blocks, and blocks to a stage."""


class Tokens(nn.Module):
    """Image to class token and patch tokens with position embeddings, (N, 1 + h w, channels).

    Args:
        in_channels: of the image.
        channels: of a token.
        image_size: height and width.

    Raises:
        InterflowError: the image holds no whole number of patches.
    """

    def __init__(self, in_channels: int, channels: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        height, width = image_size
        if height % PATCH or width % PATCH:
            raise InterflowError(f"image size {height} x {width}: DeiT needs multiples of {PATCH} pixels.")
        self.image_size = image_size
        self.patches = nn.Conv2d(in_channels, channels, PATCH, PATCH)
        self.class_token = nn.Parameter(torch.zeros(1, 1, channels))
        self.positions = nn.Parameter(torch.zeros(1, 1 + height * width // PATCH**2, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (N, in_channels, height, width)."""
        if tuple(x.shape[2:]) != self.image_size:
            raise InterflowError(
                f"images of {x.shape[2]} x {x.shape[3]} pixels: this network was made for "
                f"{self.image_size[0]} x {self.image_size[1]}; give create_model their image_size."
            )
        patches = self.patches(x).flatten(2).transpose(1, 2)
        return torch.cat([self.class_token.expand(x.shape[0], -1, -1), patches], dim=1) + self.positions


class RetrievingBlock(Block):
    """A transformer block, and behind it x + MRLA of its patch tokens.

    Args:
        channels: of a token.
        grid: patches down and across.
        base: MRLA-base, else MRLA-light.
        drop_path: chance that an image skips attention or MLP in training.
        last: the network's last block, whose tokens are normalised.
    """

    def __init__(self, channels: int, grid: tuple[int, int], *, base: bool, drop_path: float, last: bool) -> None:
        super().__init__()
        from timm.models.vision_transformer import Block as TransformerBlock  # noqa: PLC0415 - takes seconds

        self.grid = grid
        self.transformer = TransformerBlock(channels, max(1, channels // HEAD), qkv_bias=True, drop_path=drop_path)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.norm_prev = None if base else nn.LayerNorm(channels, eps=1e-6)
        self.layer = MRLABase(channels, 16) if base else MRLALight(channels, 16, gelu=True)
        self.last = nn.LayerNorm(channels, eps=1e-6) if last else nn.Identity()

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """Tokens (N, 1 + h w, channels) to tokens."""
        before, x = x, self.transformer(x)
        normed = self.norm(x)
        image = to_map(normed, self.grid)
        if isinstance(self.layer, MRLABase):
            drawn, attention, mine = self.layer(image, [left for _, left in memory.earlier])
            memory.earlier = [*memory.earlier, (memory.block, mine)]
            memory.drew_on("MRLA-base", "share", [block for block, _ in memory.earlier], attention.mean(dim=1))
        else:
            assert self.norm_prev is not None  # noqa: S101 - the light form has it
            drawn, gate = self.layer(image, to_map(self.norm_prev(before), self.grid))
            memory.drew_on("MRLA-light", "gate", (memory.block,), gate.mean(dim=1, keepdim=True))
        # the authors add the class token's layer norm to it, where patches get the attention's output
        return self.last(x + torch.cat([normed[:, :1], drawn.flatten(2).transpose(1, 2)], dim=1))


def to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patch tokens of (N, 1 + h w, channels) as a map (N, channels, h, w); the class token is left out."""
    return tokens[:, 1:].transpose(1, 2).unflatten(2, grid)


class DeiT(Chain):
    """DeiT-tiny (192 channels, 12 blocks, patches of 16 pixels) with MRLA, every block a point "block<i>".

    Args:
        in_channels: of the image.
        width: multiplier of the channels, to whole self-attention heads of 64.
        image_size: height and width, multiples of 16; 224 where None.
        base: MRLA-base, else MRLA-light.
        drop_path: chance that an image skips attention or MLP in training.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        width: float,
        image_size: tuple[int, int] | None,
        base: bool,
        drop_path: float = 0.1,
    ) -> None:
        require_rate("drop_path", drop_path)
        channels = scaled(192, width, HEAD)
        height, across = image_size or (224, 224)
        stem = Tokens(in_channels, channels, (height, across))
        self_grid = (height // PATCH, across // PATCH)
        blocks = [
            (
                Stage(f"block{i}", i, channels),
                RetrievingBlock(channels, self_grid, base=base, drop_path=drop_path, last=i == BLOCKS),
            )
            for i in range(1, BLOCKS + 1)
        ]
        super().__init__(stem, [blocks[i : i + STAGE] for i in range(0, BLOCKS, STAGE)])
        self.grid = self_grid
        self.apply(_initialize)
        nn.init.trunc_normal_(stem.positions, std=0.02)
        nn.init.trunc_normal_(stem.class_token, std=0.02)

    def as_map(self, x: Tensor) -> Tensor:
        """Patch tokens as a map."""
        return to_map(x, self.grid)


def _initialize(module: nn.Module) -> None:
    """As DeiT: normal of deviation 0.02, cut off, for linear layers; biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
