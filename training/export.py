"""Export a run as a model version: `python training/export.py --help`."""

import argparse
import re
from datetime import UTC, datetime
from pathlib import Path

from model.contract import NAME_PATTERN, VERSION_PATTERN, InterflowError, ModelCard
from training import cli
from training.artefact import export_versions, network_of, next_version, require_fitting, to_onnx, write_artefact
from training.checkpoint import load_network, weights_sha256
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
    samples = run.load_samples()
    network = network_of(card)
    tensors = load_network(run.checkpoint, network)
    if weights_sha256(network) != card.provenance.weights_sha256:
        raise InterflowError(f"{run.checkpoint}: not the weights that {run.card} describes; train the run again.")

    model = to_onnx(network, card)
    difference = verify(model, card, network, tensors, samples)
    path = write_artefact(options.out, card, model)
    print(f"{run.folder} -> {path} ({len(model) / 1e6:.1f} MB); checked, largest difference {difference:.1e}")
    return 0


def _card(run: Run, exports: Path, name: str | None, version: str | None) -> ModelCard:
    card = run.finished_card()
    name = card.name if name is None else name
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
