"""Write the table of all registered networks: `python training/networks.py`."""

import argparse
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from model.catalogue import BACKBONES
from model.interflow import Interflow
from model.registry import create_model
from training import cli
from training.files import write_text

TABLE = Path("docs/networks.md")

HEADER = """# Networks

Written by `python training/networks.py`. Every name is a `--backbone` of `training/train.py` and of `create_model`.

Parameters and multiply-adds are those of the plain classifier (method `normal`) at the image size and number of classes
that it was published with; multiply-adds are of convolutions, linear layers and attention products for one image, the
classifier counted as the linear layer that it was published as. Points are what can be tapped, by name or by number;
the branches are those of S3 (S1 for the plain networks), unless `--taps` says otherwise. Accuracies are the papers', of
the plain classifier where nothing else is said; none of them is reproduced here yet.

| network | image | classes | parameters | multiply-adds | points | default branches | own attention | paper's top-1 |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def main(arguments: list[str] | None = None) -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description="Write the table of all registered networks.")
    parser.add_argument("--out", type=Path, default=TABLE, help=f"default: {TABLE}")
    options = parser.parse_args(arguments)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.out, table())
    print(f"{len(BACKBONES)} networks -> {options.out}")


def table() -> str:
    """The page, in Markdown; networks in the catalogue's order."""
    return HEADER + "\n".join(map(_row, BACKBONES)) + "\n"


def multiply_adds(network: Interflow, height: int, width: int | None = None, channels: int = 3) -> int:
    """Of one image, square where no width is given, through the backbone, and of linear layers on the pooled maps."""
    device = next(network.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network.backbone(torch.zeros(1, channels, height, width or height, device=device))
    heads = sum(network.num_classes * stage.channels for stage in network.stages)
    return counter.get_total_flops() // 2 + heads  # a multiplication and an addition count as two there


def _row(name: str) -> str:
    entry = BACKBONES[name]
    with torch.device("meta"):  # shapes only: no weights are made
        plain = create_model(name, method="normal", num_classes=entry.classes).eval()
        branches = create_model(name, method="S1" if name.startswith("plain") else "S3", num_classes=entry.classes)
        image = torch.zeros(1, 3, entry.image_size, entry.image_size)
        attention = branches.eval()(image).layer_attention
    modules = ", ".join(dict.fromkeys(row.module for row in attention))
    cells = (
        f"`{name}`",
        entry.image_size,
        entry.classes,
        f"{sum(parameter.numel() for parameter in plain.parameters()):,}",
        f"{multiply_adds(plain, entry.image_size) / 1e6:,.1f} M",
        len(branches.backbone.points),
        " ".join(stage.name for stage in branches.stages),
        f"{modules} in {len(attention)} blocks" if attention else "",
        entry.accuracy,
    )
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    cli.run(main)
