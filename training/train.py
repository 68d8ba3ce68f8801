"""Train a network: `python training/train.py --help`."""

import argparse
from pathlib import Path

import torch

from model.interflow import Interflow
from model.registry import create_model
from training import cli
from training.data import ImageData, load_data
from training.finish import finish, summary
from training.loop import StoppedError, choose_device, train
from training.recipe import Recipe, add_recipe_options, resolve_recipe
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

    if resume:
        if options or out or named:
            parser.error("--resume goes on with the run's own recipe; give no other option")
        run, recipe = Run.open(resume)
        if run.card.is_file():
            print(f"{run.folder} is finished already.")
            return 0
    else:
        recipe = resolve_recipe(named, options)
        folder = choose_folder(out, recipe)
    device = choose_device(recipe.device)
    print(recipe.to_yaml())
    data = load_data(recipe)
    network = build_network(recipe, data)
    if not resume:
        run = Run.create(folder, recipe)
    held_out = len(data.val) if data.val else 0
    print(
        f"{data.name}: {len(data.train)} images to train on, {held_out} held out, {len(data.test)} for test, "
        f"{len(data.classes)} classes; {sum(p.numel() for p in network.parameters()):,} parameters on {device}"
    )
    try:
        train(network, data, recipe, run, device)
    except StoppedError as stopped:
        print(f"\n{stopped} Go on with: python training/train.py --resume {run.folder}")
        return cli.INTERRUPTED
    print(summary(finish(network, data, recipe, run)))
    print(f"finished: {run.folder}")
    return 0


def build_network(recipe: Recipe, data: ImageData) -> Interflow:
    """The recipe's network for a data set, its weights drawn from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    return create_model(
        recipe.backbone,
        method=recipe.method,
        num_classes=len(data.classes),
        in_channels=data.spec.channels,
        depth=recipe.depth,
        width=recipe.width,
        taps=recipe.taps,
        shared_heads=recipe.shared_heads,
    )


if __name__ == "__main__":
    cli.run(main)
