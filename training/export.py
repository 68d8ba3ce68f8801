"""Export a run as a model version: `python training/export.py --help`."""

import argparse
from pathlib import Path

import numpy as np

from model.contract import InterflowError, ModelCard
from model.registry import create_model
from training import cli
from training.artefact import export_versions, next_version, require_fitting, to_onnx, write_artefact
from training.checkpoint import load_network
from training.finish import weights_sha256
from training.recipe import load_recipe
from training.run import Run, newest_finished
from training.verify import verify

EXPORTS = Path("exports")


def main(arguments: list[str] | None = None) -> int:
    """Export and verify one run; returns the exit status."""
    parser = argparse.ArgumentParser(description="Export a finished run to ONNX, verify it, and add it to exports/.")
    parser.add_argument("--run", type=Path, help="folder of the run; default: the newest finished one below runs/")
    parser.add_argument("--name", help="name of the model; default: the data set's")
    parser.add_argument("--version", help="default: one more than the highest there is")
    parser.add_argument("--out", type=Path, default=EXPORTS, help="the model repository; default: exports/")
    options = parser.parse_args(arguments)

    run = Run(options.run) if options.run else newest_finished()
    card = _card(run, options.out, options.name, options.version)
    require_fitting(options.out, card)
    network = create_model(
        card.backbone.name,
        method=card.method.name,
        num_classes=len(card.classes),
        in_channels=card.input.channels,
        depth=card.backbone.depth,
        width=card.backbone.width,
        taps=load_recipe(run.recipe).taps,
        shared_heads=card.method.shared_heads,
    ).eval()
    load_network(run.checkpoint, network)
    if weights_sha256(network) != card.provenance.weights_sha256:
        raise InterflowError(f"{run.checkpoint}: not the weights that {run.card} describes; train the run again.")

    model = to_onnx(network, card)
    difference = verify(model, card, network, np.load(run.samples))
    path = write_artefact(options.out, card, model)
    print(f"{run.folder} -> {path} ({len(model) / 1e6:.1f} MB); checked, largest difference {difference:.1e}")
    return 0


def _card(run: Run, exports: Path, name: str | None, version: str | None) -> ModelCard:
    card = run.finished_card()
    name = name or card.name
    provenance = card.provenance.model_copy(update={"versions": card.provenance.versions | export_versions()})
    final = {"name": name, "version": version or next_version(exports, name), "provenance": provenance}
    return ModelCard.from_json(card.model_copy(update=final).to_json(), "--name and --version")


if __name__ == "__main__":
    cli.run(main)
