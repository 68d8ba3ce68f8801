"""Train a network: `python training/train.py --help`."""

import argparse
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from model.contract import ModelCard
from model.interflow import Interflow
from model.registry import create_model
from training import cli
from training.data import ImageData, load_data
from training.finish import finish
from training.loop import StoppedError, choose_device, train
from training.recipe import Recipe, add_recipe_options, load_recipe, resolve_recipe
from training.run import Run, choose_folder


def main(arguments: list[str] | None = None) -> int:
    """Train, fit and measure one run; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Train a network with a prediction branch per stage, fused by attention (Interflow). "
        "Without arguments: handwritten digits, in about a minute on two CPU cores."
    )
    parser.add_argument("--recipe", help="digits, paper, or a YAML file; digits for the digits, else paper")
    parser.add_argument("--out", type=Path, help="folder of the run; default: a new one below runs/")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with a run that was stopped or killed")
    add_recipe_options(parser)
    options = vars(parser.parse_args(arguments))
    out, resume, named = (options.pop(name) for name in ("out", "resume", "recipe"))

    if resume and (options or out or named):
        parser.error("--resume goes on with the run's own recipe; give no other option")
    with ExitStack() as held:
        if resume and Run(resume).card.is_file():
            print(f"{resume} is finished already.")
            return 0
        if resume:
            run = held.enter_context(Run.open(resume))
            recipe = load_recipe(run.recipe)
        else:
            recipe = resolve_recipe(named, options)
            folder = choose_folder(out, recipe)
        device = choose_device(recipe.device)
        print(recipe.to_yaml())
        build_network(recipe, num_classes=2, in_channels=1)  # refuses now what it would refuse after the data is read
        data = load_data(recipe)
        network = build_network(recipe, len(data.classes), data.spec.channels)
        if not resume:  # now that nothing is left to refuse
            run = held.enter_context(Run.create(folder, recipe))
        return _train(network, data, recipe, run, device)


def _train(network: Interflow, data: ImageData, recipe: Recipe, run: Run, device: torch.device) -> int:
    held_out = len(data.val) if data.val else 0
    print(
        f"{data.name}: {len(data.train)} images to train on, {held_out} held out, {len(data.test)} for test, "
        f"{len(data.classes)} classes; {sum(p.numel() for p in network.parameters()):,} parameters on {device}"
    )
    if recipe.schedule == "step" and recipe.drop_epochs >= recipe.epochs:
        print(f"note: all {recipe.epochs} epochs are at a tenth of the rate; --drop-epochs says how many of the last.")
    try:
        train(network, data, recipe, run, device)
        card = finish(network, data, recipe, run)
    except (StoppedError, KeyboardInterrupt):
        print(f"\nstopped; the state is saved. Go on with: {run.resume_command}")
        return cli.INTERRUPTED
    print(summary(card))
    print(f"finished: {run.folder}")
    return 0


def build_network(recipe: Recipe, num_classes: int, in_channels: int) -> Interflow:
    """The recipe's network, its weights drawn from the recipe's seed. Raises as `create_model`."""
    torch.manual_seed(recipe.seed)
    return create_model(
        recipe.backbone,
        method=recipe.method,
        num_classes=num_classes,
        in_channels=in_channels,
        depth=recipe.depth,
        width=recipe.width,
        taps=recipe.taps,
        shared_heads=recipe.shared_heads,
        neck=recipe.neck,
        **recipe.options,
    )


def summary(card: ModelCard) -> str:
    """The card's figures as a table for people."""
    lines = [
        f"test: {card.metrics.accuracy:.2%} of {card.metrics.images} images right, ECE {card.metrics.ece:.2%}",
        f"{'stage':<10}{'reading right':>15}{'importance':>13}{'mean weight':>13}",
    ]
    for stage, accuracy, importance, weights in zip(
        card.stages, card.metrics.branch_accuracy, card.branch_importance, card.branch_weights, strict=True
    ):
        lines.append(f"{stage.name:<10}{accuracy:>15.2%}{importance:>13.3f}{np.mean(weights):>13.4f}")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
