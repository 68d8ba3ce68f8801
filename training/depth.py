"""How deep must it be? The accuracy and cost of every cut of a run's network: `python training/depth.py --help`."""

import argparse
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime
import torch
from tqdm import trange

from model.contract import BRANCH_LOGITS, BRANCH_WEIGHTS, IMAGE, LOGITS, InterflowError, ModelCard
from model.interflow import Interflow
from training import cli
from training.artefact import to_onnx
from training.calibration import fused_accuracy
from training.depth_report import DepthTable, Row, write_table
from training.files import write_text
from training.finish import finish, fitted_on
from training.grid import SPEED_ONLY, hardware
from training.loop import StoppedError, Training, choose_device, train
from training.networks import multiply_adds
from training.recipe import Recipe, load_recipe
from training.run import CUT_FILE, Run, newest_finished
from training.shorten import (
    TOLERANCE,
    Trained,
    accuracies,
    name_of_cut,
    open_trained,
    require_cuttable,
    require_tolerance,
    shorten,
    shortened,
)
from training.train import build_network

RESULTS = Path("benchmarks/results")
SLOWER = 10
"""Fine-tuning's learning rate is so many times lower than the run's: what is there is to be kept."""

ROUNDS = 15
"""Of timings; all networks take turns in each, so that what else the machine does befalls them alike."""
CALLS = {1: 20, 32: 3}
"""In a round, by batch size."""
ANSWER = [LOGITS, BRANCH_LOGITS, BRANCH_WEIGHTS]
"""Outputs that an answer without maps takes."""


def main(arguments: list[str] | None = None) -> int:
    """Measure every cut of one run, with and without fine-tuning, and advise; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Cut a finished run's network behind each of its stages, and measure what that loses and saves: "
        "accuracy, parameters, file size, multiply-adds, latency. With --fine-tune, also what a short training of "
        "the cut networks wins back; each is then a finished run of its own. The same command goes on where it stopped."
    )
    parser.add_argument("--run", type=Path, help="folder of the run; default: the newest finished one below runs/")
    parser.add_argument("--fine-tune", type=cli.count, metavar="EPOCHS", help="also train the cut networks for so long")
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help="fine-tune the cuts behind these only")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help=f"points of held-out accuracy that a shorter network may lose (default: {TOLERANCE})",
    )
    parser.add_argument("--threads", type=cli.count, default=1, help="of onnxruntime, for the timings (default: 1)")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"where table and picture go (default: {RESULTS})")
    options = parser.parse_args(arguments)
    if options.stages and not options.fine_tune:
        parser.error("--stages are those to --fine-tune; give the EPOCHS")

    require_tolerance(options.tolerance)
    run = Run(options.run) if options.run else newest_finished()
    card = run.finished_card()
    require_cuttable(card)
    plans = _plans(run, card, options.stages, options.fine_tune) if options.fine_tune else []

    print(f"asking {run.folder} about its held-out and test images")
    trained = open_trained(run)
    table = measure(trained, options.tolerance, options.threads)
    print(table.to_markdown())
    page = write_table(table, options.out)
    try:
        for plan in plans:
            if all(row.stage != plan.stage for row in table.rows):
                continue  # it was said why
            table = _with(table, _fine_tuned_row(plan, trained, table))
            write_table(table, options.out)
    except (StoppedError, KeyboardInterrupt):
        print("\nstopped; the state is saved. The same command goes on.")
        return cli.INTERRUPTED
    if plans:
        print(table.to_markdown())
    print(f"{table.advice()}\ntable: {page}")
    return 0


def measure(trained: Trained, tolerance: float, threads: int) -> DepthTable:
    """Cut a run's network behind each stage, the last one too, and measure all of them.

    Args:
        trained: the run.
        tolerance: points of held-out accuracy that may be lost.
        threads: of onnxruntime.

    Returns:
        One row a stage; a stage that the backbone cannot be cut behind has none, and it is said why.
    """
    card, spec = trained.card, trained.card.input
    names = [info.name for info in card.stages]
    graphs: dict[str, bytes] = {}
    networks: dict[str, Interflow] = {}
    for stage in names:
        try:
            network, short = shortened(trained, stage)
        except InterflowError as error:
            if stage == names[-1]:
                raise
            print(f"no cut behind {stage}: {error}")
            continue
        graphs[stage] = to_onnx(network, short)
        networks[stage] = network
    times = time_models(graphs, trained.run.load_samples(), threads)
    rows = [
        Row(
            stage=stage,
            fine_tuned=0,
            run=str(trained.run.folder),
            held_out=held_out,
            test=test,
            parameters=sum(parameter.numel() for parameter in networks[stage].parameters()),
            onnx_bytes=len(graphs[stage]),
            multiply_adds=multiply_adds(networks[stage], spec.height, spec.width, spec.channels),
            latency_ms=1000 * times[stage][1],
            images_per_second=32 / times[stage][32],
        )
        for stage, (held_out, test) in zip(names, accuracies(trained), strict=True)
        if stage in graphs
    ]
    cpu = hardware(torch.device("cpu")).rpartition(", ")[0]
    return DepthTable(
        run=str(trained.run.folder),
        model=card.name,
        weights_sha256=card.provenance.weights_sha256,
        fitted_on=fitted_on(trained.data),
        test_images=len(trained.data.test),
        conditions=f"onnxruntime {onnxruntime.__version__}, {cpu}, {threads} thread{'s' if threads > 1 else ''}; "
        f"medians over {ROUNDS} rounds in which all networks take turns",
        tolerance=tolerance,
        rows=rows,
    )


def time_models(models: dict[str, bytes], samples: np.ndarray, threads: int) -> dict[str, dict[int, float]]:
    """Seconds that each model takes for a batch of each size in `CALLS`, by name; medians over all calls.

    Args:
        models: serialised graphs by name.
        samples: real images, uint8 (M, height, width, channels).
        threads: of onnxruntime.
    """
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = threads
    sessions = {
        name: onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
        for name, model in models.items()
    }
    batches = {size: np.resize(samples, (size, *samples.shape[1:])) for size in CALLS}
    taken: dict[str, dict[int, list[float]]] = {name: {size: [] for size in CALLS} for name in models}
    for lap in trange(1 + ROUNDS, desc="timing", unit="round", leave=False, disable=None):
        for size, calls in CALLS.items():
            for name, session in sessions.items():
                for _ in range(calls):
                    started = time.perf_counter()
                    session.run(ANSWER, {IMAGE: batches[size]})
                    if lap:  # the first round warms up
                        taken[name][size].append(time.perf_counter() - started)
    return {name: {size: median(times) for size, times in by_size.items()} for name, by_size in taken.items()}


@dataclass(frozen=True)
class Plan:
    """A cut network to fine-tune, or one that was.

    Attributes:
        stage: the last one kept.
        run: its folder, beside that of the run it is cut from.
        recipe: that run's, with fewer stages, these epochs and a low rate.
        origin: what `CUT_FILE` says.
    """

    stage: str
    run: Run
    recipe: Recipe
    origin: dict[str, str]


def _plans(run: Run, card: ModelCard, stages: Sequence[str] | None, epochs: int) -> list[Plan]:
    """From shallow to deep.

    Raises:
        InterflowError: no such stage, a network that no recipe describes, or a folder that holds something else.
    """
    if card.method.initial_weights != "random":
        raise InterflowError(
            f"--fine-tune: {run.folder} was trained by {card.method.name}, which gives {len(card.stages)} weights, so "
            f"that no recipe describes a network of fewer stages; leave it out."
        )
    names = [info.name for info in card.stages]
    if odd := next((stage for stage in stages or () if stage not in names[:-1]), None):
        raise InterflowError(f"--stages {odd}: {run.folder} can be cut behind {', '.join(names[:-1])}.")
    recipe = load_recipe(run.recipe)
    plans = []
    for place, stage in enumerate(names[:-1]):
        if stages and stage not in stages:
            continue
        settings = {
            "mean": card.input.mean,
            "std": card.input.std,
            "init": str(run.checkpoint),
            "depth": card.stages[place].depth,
            "taps": tuple(names[: place + 1]),
            "epochs": epochs,
            "lr": recipe.lr / SLOWER,
            "drop_epochs": 0,
            "weigh_anew": True,  # as the cut that is not trained on
        }
        origin = {"run": run.folder.name, "stage": stage, "weights_sha256": card.provenance.weights_sha256}
        folder = run.folder.with_name(name_of_cut(run.folder.name, stage))
        plan = Plan(stage, Run(folder), recipe.model_copy(update=settings), origin)
        _require_own(plan)
        plans.append(plan)
    return plans


def _require_own(plan: Plan) -> None:
    """Refuse a folder that holds another run, or one that was begun from other weights."""
    if not plan.run.recipe.is_file():
        return
    origin = None
    with suppress(OSError, ValueError):
        origin = json.loads((plan.run.folder / CUT_FILE).read_text(encoding="utf-8"))
    stored = load_recipe(plan.run.recipe)
    same = all(value == getattr(stored, name) for name, value in plan.recipe if name not in SPEED_ONLY | {"init"})
    if origin != plan.origin or not same:
        raise InterflowError(
            f"{plan.run.folder} holds another run than {plan.origin['run']} as it is now, cut behind {plan.stage} and "
            f"fine-tuned for {plan.recipe.epochs} epochs; move it away."
        )


def fine_tune(plan: Plan, trained: Trained) -> None:
    """Train a cut network to the end of its plan, from where it stands; a finished run is left as it is.

    Raises:
        StoppedError: SIGINT or SIGTERM came; the state is saved.
        InterflowError: as `train`, or (BusyError) another process has the run.
    """
    run, recipe, data = plan.run, plan.recipe, trained.data
    if run.card.is_file():
        return
    device = choose_device(recipe.device)
    network = build_network(recipe, len(data.classes), data.spec, begun=True)

    def begin() -> None:
        # The checkpoint first, so that the recipe, which makes the folder a run, finds the weights to begin with: then
        # `train.py --resume` goes on with it as with any other.
        run.checkpoint.unlink(missing_ok=True)
        network.load_state_dict(shorten(trained.network, trained.card, plan.stage)[0].state_dict())
        Training(network, data, recipe, run, device, stop=[], quiet=True).save()
        write_text(run.folder / CUT_FILE, json.dumps(plan.origin) + "\n")

    with Run.open(run.folder) if run.recipe.is_file() else Run.create(run.folder, recipe, begin):
        train(network, data, recipe, run, device)
        finish(network, data, recipe, run)


def _fine_tuned_row(plan: Plan, trained: Trained, table: DepthTable) -> Row:
    print(f"{plan.stage}, fine-tuned for {plan.recipe.epochs} epochs: {plan.run.folder}")
    fine_tune(plan, trained)
    again = open_trained(plan.run, trained.data)
    plain = next(row for row in table.rows if row.stage == plan.stage)  # of the same graph, so of the same cost
    return replace(
        plain,
        fine_tuned=plan.recipe.epochs,
        run=str(plan.run.folder),
        held_out=fused_accuracy(again.held_out),
        test=fused_accuracy(again.test),
    )


def _with(table: DepthTable, row: Row) -> DepthTable:
    place = next(i for i, other in enumerate(table.rows) if other.stage == row.stage)
    return replace(table, rows=[*table.rows[: place + 1], row, *table.rows[place + 1 :]])


if __name__ == "__main__":
    cli.run(main)
