"""Two runs side by side, such as one with a top-down neck and one without: `python benchmarks/neck.py RUN RUN`.

Draws their accuracies, fused and by stage, and where each stage of each network looked in one test image: its evidence
for the answer's class on the grid of its map (contribution less its mean over the classes), red for, blue against.

Found (docs/neck.png; VGG-16 S3 at width 0.125, 4 epochs of CIFAR-10, seed 0, one CPU thread; test accuracy in %):

                 fused   conv7  conv9  conv11  conv13     with --recipe paper --epochs 4 --drop-epochs 1
    no neck      70.33   60.67  68.43   69.68   68.10     --val-fraction 0.1 --auxiliary-loss 1 --lr 0.02
    neck aff     63.36   60.88  63.04   63.11   61.71     (at --lr 0.005: 68.21 without, 63.42 with)

In so short a training the neck costs accuracy: its branches share what the deepest stage says, and end up alike. What
it gives is the first stage's map: in the picture, of the whole object where without it single cells spoke.
"""

import sys
from pathlib import Path

if sys.path[0] == str(Path(__file__).parent):  # as a script: this folder's modules would hide others of their names
    del sys.path[0]

import argparse

import matplotlib.pyplot as plt
import torch

from model.explain import fused_confidences
from model.interflow import Normalize
from training.finish import open_finished
from training.run import Run


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description="Accuracies and evidence maps of two runs on one image.")
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs on the same data")
    parser.add_argument("--sample", type=int, default=0, help="which of the runs' 20 test images")
    parser.add_argument("--out", type=Path, default=Path("docs/neck.png"))
    options = parser.parse_args()

    cards = [Run(folder).finished_card() for folder in options.runs]
    columns = 1 + max(len(card.stages) for card in cards)
    figure, axes = plt.subplots(
        len(cards), columns, figsize=(2.4 * columns, 2.9 * len(cards)), squeeze=False, layout="constrained"
    )
    for folder, card, row in zip(options.runs, cards, axes, strict=True):
        _, network = open_finished(Run(folder))
        pixels = torch.from_numpy(Run(folder).load_samples()[options.sample : options.sample + 1])
        with torch.no_grad():
            output = network(Normalize(card.input.mean, card.input.std)(pixels))
        answer = int(output.logits.argmax())
        confidence = fused_confidences(output.logits.numpy(), card.temperature, card.power).max()
        neck = f"neck {card.backbone.neck}" if card.backbone.neck else "no neck"
        row[0].imshow(pixels[0])
        row[0].set_title(
            f"{card.backbone.name} {card.method.name}, {neck}\ntest accuracy {card.metrics.accuracy:.2%}\n"
            f"{card.classes[answer]!r}, {confidence:.0%}",
            fontsize="small",
        )
        evidence = []
        for branch_map, weights in zip(output.branch_maps, network.attention.matrix().detach(), strict=True):
            added = weights[:, None, None] * branch_map[0]
            evidence.append((added - added.mean(dim=0))[answer])
        most = max(float(m.abs().max()) for m in evidence)
        for axis, stage, found, accuracy in zip(
            row[1:], card.stages, evidence, card.metrics.branch_accuracy, strict=False
        ):
            axis.imshow(pixels[0].float().mean(dim=2), cmap="gray", alpha=0.6, extent=(0, 1, 1, 0))
            axis.imshow(found, cmap="RdBu_r", vmin=-most, vmax=most, alpha=0.6, extent=(0, 1, 1, 0))
            text = f"{stage.name}: reading {accuracy:.2%}\nevidence {float(found.mean()):+.2f}"
            axis.set_title(text, fontsize="small")
        for axis in row:
            axis.axis("off")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=110)
    print(options.out)


if __name__ == "__main__":
    main()
