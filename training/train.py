"""Train a network: `python training/train.py --help`.

On several GPUs: `torchrun --nproc-per-node 8 training/train.py`, with the same options.
"""

import argparse
import inspect
from contextlib import ExitStack
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from model.backbones.backbone import Normalization
from model.contract import InputSpec, InterflowError, ModelCard
from model.interflow import Interflow
from model.registry import create_model
from training import cli, ranks
from training.data import ImageData, input_spec, load_data
from training.finish import finish
from training.loop import StoppedError, choose_device, train
from training.recipe import Recipe, add_recipe_options, load_recipe, resolve_recipe
from training.run import Run, choose_folder

CLASSES_SHOWN = 10
"""At the end of training, those of lowest recall; the card has all."""


class Plan(NamedTuple):
    """What every process that takes part in a run must know."""

    recipe: Recipe
    data: ImageData
    folder: Path
    device: str
    """Its kind: cpu or cuda."""


def main(arguments: list[str] | None = None) -> int:
    """Train, fit and measure one run, in this process or as one of those that torchrun started.

    Returns the exit status.
    """
    with ranks.joined(), ExitStack() as held:
        begun = begin(arguments, held) if ranks.first() else None
        plan = ranks.from_first(lambda: begun and begun[1])
        if plan is None:
            return 0
        # Of the others, the first has the weights: also those that it was to start from.
        network = begun[0] if begun else build_network(plan.recipe, len(plan.data.classes), plan.data.spec, begun=True)
        return _train(network, plan.data, plan.recipe, Run(plan.folder), choose_device(plan.device))


def begin(arguments: list[str] | None, held: ExitStack) -> tuple[Interflow, Plan] | None:
    """Everything that can be refused before training, and then the run's folder, locked while `held` is.

    Returns None where the run is finished already.

    Raises:
        InterflowError: of recipe, network, data or folder, which is refused.
    """
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
    if resume and Run(resume).card.is_file():
        print(f"{resume} is finished already.")
        return None
    if resume:
        run = held.enter_context(Run.open(resume))
        recipe = load_recipe(run.recipe)
    else:
        recipe = resolve_recipe(named, options)
        folder = choose_folder(out, recipe)
    device = choose_device(recipe.device)
    begun = resume is not None and run.checkpoint.is_file()  # it holds the weights, whatever they began as
    network = build_network(recipe, 2, input_spec(recipe), begun)  # refuses now what else it would after the data
    recipe = with_normalization(recipe, network.backbone.normalization)
    print(recipe.to_yaml())
    data = load_data(recipe)
    network = build_network(recipe, len(data.classes), data.spec, begun)
    require_images_for_all(network, data, recipe)
    if not resume:  # now that nothing is left to refuse
        run = held.enter_context(Run.create(folder, recipe))
    _announce(network, data, recipe, device)
    return network, Plan(recipe, data, run.folder, device.type)


def require_images_for_all(network: Interflow, data: ImageData, recipe: Recipe) -> None:
    """Refuse more processes than a batch has images, and for some networks (of timm), than the last batch has.

    Raises:
        InterflowError: there are more.
    """
    count = ranks.size()
    if recipe.batch_size < count:
        raise InterflowError(
            f"batch_size {recipe.batch_size} for {count} processes: each is to have an image of every batch; "
            "start fewer processes."
        )
    if 1 < (last := len(data.train) % recipe.batch_size) < count:
        try:
            with torch.no_grad():
                network.eval()(torch.empty(0, data.spec.channels, *data.size))
        except RuntimeError as error:
            raise InterflowError(
                f"the last batch of an epoch has {last} images for {count} processes, and {recipe.backbone} does not "
                "take a batch of none; start fewer processes, or another number of them with another --batch-size."
            ) from error


def _announce(network: Interflow, data: ImageData, recipe: Recipe, device: torch.device) -> None:
    held_out, processes = len(data.val) if data.val else 0, ranks.size()
    print(
        f"{data.name}: {len(data.train)} images to train on, {held_out} held out, {len(data.test)} for test, "
        f"{len(data.classes)} classes; {sum(p.numel() for p in network.parameters()):,} parameters on {device}"
        + (f", {processes} processes" if processes > 1 else "")
    )
    if recipe.schedule == "step" and recipe.drop_epochs >= recipe.epochs:
        print(f"note: all {recipe.epochs} epochs are at a tenth of the rate; --drop-epochs says how many of the last.")
    if processes > 1 and recipe.compile:
        print("note: several processes do not compile; --compile is left out.")


def _train(network: Interflow, data: ImageData, recipe: Recipe, run: Run, device: torch.device) -> int:
    try:
        train(network, data, recipe, run, device)
        card = finish(network, data, recipe, run)
    except (StoppedError, KeyboardInterrupt):
        if ranks.first():
            again = " (or with torchrun, by any number of processes)" if ranks.several() else ""
            print(f"\nstopped; the state is saved. Go on with: {run.resume_command}{again}")
        return cli.INTERRUPTED
    if card:
        print(summary(card))
        print(f"finished: {run.folder}")
    return 0


def build_network(recipe: Recipe, num_classes: int, spec: InputSpec, begun: bool = False) -> Interflow:
    """The recipe's network, its weights drawn from the recipe's seed.

    Args:
        recipe: says which.
        num_classes: of the data.
        spec: of the images, for their size and channels.
        begun: whether the run has a checkpoint, so that weights to start from are not wanted any more.

    Raises:
        InterflowError: as `create_model`; or an option of the backbone bears the name of one of its other arguments.
    """
    if taken := sorted(recipe.options.keys() & inspect.signature(create_model).parameters):
        raise InterflowError(
            f"options {', '.join(taken)}: options are for what {recipe.backbone} alone has. Depth, width, taps and "
            "neck are settings of their own, such as --depth 13; classes and channels are those of the data."
        )
    torch.manual_seed(recipe.seed)
    init = None if begun else recipe.init
    return create_model(
        recipe.backbone,
        method=recipe.method,
        num_classes=num_classes,
        in_channels=spec.channels,
        depth=recipe.depth,
        width=recipe.width,
        taps=recipe.taps,
        shared_heads=recipe.shared_heads,
        neck=recipe.neck,
        image_size=(spec.height, spec.width),
        pretrained=init == "pretrained" or (init is not None and Path(init)),
        **recipe.options,
    )


def with_normalization(recipe: Recipe, normalization: Normalization | None) -> Recipe:
    """The recipe, with the mean and deviation that pretrained weights expect where it does not give its own."""
    if normalization is None or recipe.mean is not None:
        return recipe
    return recipe.model_copy(update=normalization._asdict())


def summary(card: ModelCard) -> str:
    """The card's figures as tables for people: the whole, the stages, the classes of lowest recall."""
    metrics = card.metrics
    wide = max(10, *(len(stage.name) + 2 for stage in card.stages))
    lines = [
        f"test: {metrics.accuracy:.2%} of {metrics.images} images right, ECE {metrics.ece:.2%}",
        f"{'stage':<{wide}}{'reading right':>15}{'importance':>13}{'mean weight':>13}",
    ]
    for stage, accuracy, importance, weights in zip(
        card.stages, metrics.branch_accuracy, card.branch_importance, card.branch_weights, strict=True
    ):
        lines.append(f"{stage.name:<{wide}}{accuracy:>15.2%}{importance:>13.3f}{np.mean(weights):>13.4f}")
    if metrics.class_recall is None or metrics.class_images is None:
        return "\n".join(lines)  # a card from before there were figures by class
    lines[0] += f", macro-F1 {metrics.macro_f1:.2%}, AUROC {metrics.auroc:.4f}"
    rows = sorted(zip(metrics.class_recall, card.classes, metrics.class_images, strict=True), key=itemgetter(0))
    shown = rows[:CLASSES_SHOWN]
    wide = max(wide, *(len(name) + 2 for _, name, _ in shown))
    lines.append(f"{'class':<{wide}}{'recall':>15}{'of images':>13}")
    lines += [f"{name:<{wide}}{recall:>15.2%}{images:>13}" for recall, name, images in shown]
    if len(rows) > len(shown):
        lines.append(f"and {len(rows) - len(shown)} classes of higher or equal recall")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main, together=True)
