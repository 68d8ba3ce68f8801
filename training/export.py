"""Export a run as a model version: `python training/export.py --help`."""

import argparse
import re
from datetime import UTC, datetime
from pathlib import Path

from onnx import ModelProto

from model.contract import NAME_PATTERN, VERSION_PATTERN, InterflowError, ModelCard
from model.cut import CutError, cut
from model.interflow import Interflow
from training import cli
from training.artefact import export_versions, next_version, require_fitting, to_graph, with_card, write_artefact
from training.finish import open_finished
from training.precision import PRECISIONS, SUFFIXES, reduced, summary
from training.precision import TOLERANCE as PRECISION_TOLERANCE
from training.recipe import load_recipe
from training.run import Run, newest_finished
from training.shorten import (
    AUTO,
    TOLERANCE,
    choose,
    data_of,
    open_trained,
    require_stage,
    require_tolerance,
    shortened,
)
from training.verify import verify
from training.work import stage_work

EXPORTS = Path("exports")


def main(arguments: list[str] | None = None) -> int:
    """Export and verify one run; returns the exit status."""
    parser = argparse.ArgumentParser(description="Export a finished run to ONNX, verify it, and add it to exports/.")
    parser.add_argument("--run", type=Path, help="folder of the run; default: the newest finished one below runs/")
    parser.add_argument("--name", help="name of the model; default: the data set's")
    parser.add_argument("--version", help="default: one more than the highest there is")
    parser.add_argument("--out", type=Path, default=EXPORTS, help="the model repository; default: exports/")
    parser.add_argument(
        "--depth",
        metavar="STAGE",
        help=f"export the network without the stages behind this one, as <name>-<stage>, or with {AUTO} the shortest "
        "that loses no more than --tolerance on held-out images; takes the run's own images",
    )
    parser.add_argument(
        "--precision",
        choices=tuple(PRECISIONS),
        default="float32",
        help="of all but class maps, pooling and fusion: int8 for CPUs, as <name>-int8, or float16 for GPUs, as "
        "<name>-fp16; takes the run's own images",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        help=f"points of accuracy that may be lost by --depth {AUTO} (default: {TOLERANCE}), and on test images by "
        f"--precision (default: {PRECISION_TOLERANCE})",
    )
    options = parser.parse_args(arguments)

    run = Run(options.run) if options.run else newest_finished()
    samples = run.load_samples()
    tolerance = require_tolerance(PRECISION_TOLERANCE if options.tolerance is None else options.tolerance)
    if options.depth:
        card, network = _cut(run, options.depth, options.tolerance)
    else:
        card, network = open_finished(run)
    precision = PRECISIONS[options.precision]
    name = f"{card.name}{SUFFIXES[precision]}" if options.name is None else options.name
    card = _named(card, options.out, name, options.version)
    require_fitting(options.out, card)

    graph = to_graph(network, card)
    if precision != "float32":
        card = _with_work(card, network)
        recipe = load_recipe(run.recipe).model_copy(update={"mean": card.input.mean, "std": card.input.std})
        graph, card = reduced(
            graph, card, data_of(run, recipe), workers=recipe.workers, precision=precision, tolerance=tolerance
        )
        print(summary(card))
    card = _with_exits_if_it_can_be_cut(graph, card)
    model = with_card(graph, card)
    difference = verify(model, card, network, network.state_dict(), samples)
    path = write_artefact(options.out, card, model)
    print(f"{run.folder} -> {path} ({len(model) / 1e6:.1f} MB); checked, largest difference {difference:.1e}")
    return 0


def _cut(run: Run, stage: str, tolerance: float | None) -> tuple[ModelCard, Interflow]:
    """The run's network without the stages behind this one, or behind that which `AUTO` finds."""
    tolerance = require_tolerance(TOLERANCE if tolerance is None else tolerance)
    require_stage(run.finished_card(), stage)
    print(f"asking {run.folder} about its held-out and test images")
    trained = open_trained(run)
    if stage == AUTO:
        stage, why = choose(trained, tolerance)
        print(why)
    if stage == trained.card.stages[-1].name:
        return trained.card, trained.network
    network, card = shortened(trained, stage)
    return card, network


def _with_work(card: ModelCard, network: Interflow) -> ModelCard:
    """The card with the stages' work counted, as those from before adaptive depth have it not."""
    work = stage_work(network, card.input)
    stages = (stage.model_copy(update={"work": done}) for stage, done in zip(card.stages, work, strict=True))
    return card.model_copy(update={"stages": tuple(stages)})


def _with_exits_if_it_can_be_cut(graph: ModelProto, card: ModelCard) -> ModelCard:
    if card.exits:
        try:
            cut(graph, len(card.stages))
        except CutError as error:
            print(f"answers cannot stop early: {error}")
            return card.model_copy(update={"exits": ()})
    return card


def _named(card: ModelCard, exports: Path, name: str, version: str | None) -> ModelCard:
    if not re.fullmatch(NAME_PATTERN, name):
        raise InterflowError(f"--name {name!r}: expected letters, digits, `.`, `_` and `-`, a letter or digit first.")
    version = next_version(exports, name) if version is None else version
    if not re.fullmatch(VERSION_PATTERN, version):
        raise InterflowError(f"--version {version!r}: expected a whole number from 1 up.")
    provenance = card.provenance.model_copy(
        update={"created": datetime.now(UTC), "versions": card.provenance.versions | export_versions()}
    )
    return card.model_copy(update={"name": name, "version": version, "provenance": provenance})


if __name__ == "__main__":
    cli.run(main)
