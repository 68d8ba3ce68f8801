"""Gradients of a 100-layer plain network, Normal and S1: `python benchmarks/plain100_gradients.py`.

What happens to the gradient on its way through 100 convolutions without shortcuts (Interflow, Sec. IV-F), with one
classifier at the end and with 15 branches: its norm in every layer, at the start and after 40 steps on one batch of 64
CIFAR-10 images, with the paper's optimiser at two learning rates.

Found (width 0.25, seed 0, 2 CPU cores; docs/plain100-gradients.png):

- At the start the gradient explodes on its way back rather than vanishing, because every batch norm behind a random
  convolution amplifies it: 1.6e6 in the first convolution of Normal and 2.3e5 of S1, against 2.6 and 0.17 in the last.
- The first steps at such gradients make the early weights so large that batch norm, which divides by their scale, lets
  next to nothing through from then on. After 40 steps at rate 1e-3, Normal's gradient falls from 1e-1 in the last
  convolution to 1e-14 in the first; S1's lies between 1e-6 and 1e-3 in all of them: its branches feed it on the way.
- Both learn the batch: loss 0.04 (Normal) and 2e-4 (S1). Normal does so with its last layers alone; that one batch
  is no test of depth. At rate 1e-2 both reach nearly 0, and S1's loss 0 exactly, after which it has no gradient.
- Narrower networks on 64 digits (not drawn): at width 0.0625 and rate 1e-3 neither learns the batch in 40 steps; at
  rate 1e-2, widths 0.0625 and 0.125, S1 diverges, and Normal stands still at 2.25, little better than guessing.
"""

import sys
from pathlib import Path

if sys.path[0] == str(Path(__file__).parent):  # as a script: this folder's modules would hide others of their names
    del sys.path[0]

import argparse
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.nn import functional

from model.interflow import Interflow
from model.registry import create_model
from training.data import load_data
from training.recipe import resolve_recipe

STEPS, BATCH = 40, 64


class Study(NamedTuple):
    """One network on one batch: gradient norm per convolution before and after, and the loss of every step."""

    before: list[float]
    after: list[float]
    losses: list[float]


def study(method: str, images: Tensor, labels: Tensor, *, layers: int, width: float, lr: float, steps: int) -> Study:
    """Train a plain network on one batch, with the paper's momentum and weight decay.

    Args:
        method: "normal" or "S1".
        images: normalised, (N, channels, 32, 32).
        labels: (N,).
        layers: 40, 50, ..., 100.
        width: multiplier of the channels.
        lr: constant.
        steps: of SGD.
    """
    torch.manual_seed(0)
    network = create_model(f"plain{layers}", method=method, in_channels=images.shape[1], width=width).train()
    optimizer = torch.optim.SGD(network.parameters(), lr, momentum=0.95, weight_decay=5e-4)
    norms, losses = [], []
    for step in range(steps + 1):
        optimizer.zero_grad()
        loss = functional.cross_entropy(network(images).logits, labels)
        loss.backward()
        losses.append(loss.item())
        if step in (0, steps):
            norms.append(_gradient_norms(network))
        optimizer.step()
    before, after = norms
    return Study(before, after, losses)


def _gradient_norms(network: Interflow) -> list[float]:
    weights = [p for p in network.backbone.parameters() if p.ndim == 4]
    return [float(weight.grad.norm()) for weight in weights if weight.grad is not None]


def main() -> None:
    """Measure and draw."""
    parser = argparse.ArgumentParser(description="Gradient norms of plain100, Normal and S1, on one batch of CIFAR-10.")
    parser.add_argument("--layers", type=int, default=100)
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 1e-2])
    parser.add_argument("--out", type=Path, default=Path("docs/plain100-gradients.png"))
    options = parser.parse_args()

    data = load_data(resolve_recipe("paper", {"data": "cifar10"}))
    pixels, labels = next(data.train.batches([torch.arange(BATCH)], workers=0))
    mean, std = torch.tensor(data.spec.mean), torch.tensor(data.spec.std)
    images = ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)

    figure, axes = plt.subplots(1, 1 + len(options.lr), figsize=(5 * (1 + len(options.lr)), 4), layout="constrained")
    for method, colour in (("normal", "tab:red"), ("S1", "tab:blue")):
        for lr, axis in zip(options.lr, axes, strict=False):
            found = study(method, images, labels, layers=options.layers, width=options.width, lr=lr, steps=STEPS)
            axis.semilogy(range(1, options.layers + 1), found.before, colour, ls=":", label=f"{method}, at the start")
            axis.semilogy(range(1, options.layers + 1), found.after, colour, label=f"{method}, after {STEPS} steps")
            axis.set(title=f"gradient norm, rate {lr:g}", xlabel="convolution")
            axes[-1].plot(found.losses, colour, ls="-" if lr == options.lr[0] else "--", label=f"{method}, rate {lr:g}")
            print(
                f"{method}, rate {lr:g}: gradient norm of convolution 1 {found.before[0]:.2g} at the start and "
                f"{found.after[0]:.2g} after {STEPS} steps, of convolution {options.layers} {found.before[-1]:.2g} and "
                f"{found.after[-1]:.2g}; loss {found.losses[0]:.2f} to {found.losses[-1]:.2f}",
                flush=True,
            )
    axes[-1].set(title="loss on the batch", xlabel="step", yscale="log")
    for axis in axes:
        axis.legend(fontsize="small")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
