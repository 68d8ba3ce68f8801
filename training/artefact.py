"""From a finished run to a model version that the server, or Triton, loads."""

import io
import os
import re
import shutil
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from model.contract import CARD_FILE, IMAGE, METADATA_KEY, MODEL_FILE, VERSION_PATTERN, InterflowError, ModelCard
from model.interflow import Interflow, InterflowOutput, Normalize
from model.methods import find_method
from model.registry import create_model
from training.config_pbtxt import config_pbtxt
from training.files import is_abandoned, write_text

OPSET = 20
CONFIG_FILE = "config.pbtxt"
STAGED = ".staged-"
"""Begins the name of a version's folder while it is written; then comes the process that writes it."""


def network_of(card: ModelCard) -> Interflow:
    """The network that a card describes, in evaluation mode, its weights not loaded yet.

    Raises:
        InterflowError: there is no such network.
    """
    weights = card.method.initial_weights  # a shortened network has fewer of them than its method began with
    method = replace(find_method(card.method.name), initial_weights=None if weights == "random" else weights)
    network = create_model(
        card.backbone.name,
        method=method,
        num_classes=len(card.classes),
        in_channels=card.input.channels,
        depth=card.backbone.depth,
        width=card.backbone.width,
        taps=[stage.name for stage in card.stages],
        shared_heads=card.method.shared_heads,
        neck=card.backbone.neck,
        image_size=(card.input.height, card.input.width),
        **card.backbone.options,
    )
    described = [(stage.name, stage.depth, stage.channels) for stage in card.stages]
    if described != [(stage.name, stage.depth, stage.channels) for stage in network.stages]:
        raise InterflowError(f"the card's stages {described} are not those of its network; train the run again.")
    return network.eval()


class ServedNetwork(nn.Module):
    """The graph that is exported: pixels in, all outputs out, in the order of `ModelCard.outputs`."""

    def __init__(self, network: Interflow, card: ModelCard) -> None:
        super().__init__()
        self.normalize = Normalize(card.input.mean, card.input.std)
        self.network = network

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """uint8 (N, height, width, channels) to all that `ModelCard.outputs` lists."""
        output: InterflowOutput = self.network(self.normalize(image))
        tensors = (output.logits, output.branch_logits, output.branch_weights, *output.branch_maps)
        return (*tensors, output.stacked_layer_attention()) if output.layer_attention else tensors


def to_onnx(network: Interflow, card: ModelCard) -> bytes:
    """Export a network in evaluation mode: one file, weights inside, the card in its metadata, the batch symbolic."""
    return with_card(to_graph(network, card), card)


def to_graph(network: Interflow, card: ModelCard) -> onnx.ModelProto:
    """As `to_onnx`, with nothing of the card inside yet; of the card, only what describes input and outputs counts."""
    spec = card.input
    example = torch.zeros(2, spec.height, spec.width, spec.channels, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations are not the user's to mend
        program = torch.onnx.export(
            ServedNetwork(network, card).eval(),
            (example,),
            input_names=[IMAGE],
            output_names=list(card.outputs),
            dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # noqa: S101 - so with dynamo=True
    return program.model_proto


def with_card(model: onnx.ModelProto, card: ModelCard) -> bytes:
    """A graph and the card that describes it as one file; the graph is given the card."""
    onnx.helper.set_model_props(model, {METADATA_KEY: card.to_json()})
    model.doc_string = f"Interflow {card.name}, version {card.version}; outputs and card: metadata {METADATA_KEY!r}"
    onnx.checker.check_model(model, full_check=True)
    buffer = io.BytesIO()
    onnx.save_model(model, buffer)
    return buffer.getvalue()


def next_version(exports: Path, name: str) -> str:
    """One more than the highest version of a model there is."""
    return str(1 + max((int(path.name) for path in _versions(exports / name)), default=0))


def require_fitting(exports: Path, card: ModelCard) -> None:
    """Check that a card's version is free, and that its model's other versions have the same signature and classes.

    Raises:
        InterflowError: names the version or the difference.
    """
    if (exports / card.name / card.version).exists():
        raise InterflowError(
            f"{exports / card.name / card.version} is there already; leave --version out for the next free one."
        )
    mine = _signature(card)
    for path in _versions(exports / card.name):
        theirs = _signature(ModelCard.from_json((path / CARD_FILE).read_bytes(), path / CARD_FILE))
        odd = next((key for key in mine | theirs if mine.get(key) != theirs.get(key)), None)
        if odd:
            raise InterflowError(
                f"versions of one model share one signature, but {odd} is {mine.get(odd, 'missing')} here and "
                f"{theirs.get(odd, 'missing')} in {path}; export under another name with --name."
            )


def write_artefact(exports: Path, card: ModelCard, model: bytes) -> Path:
    """Put a model version in the repository whole: staged under a dot-name, renamed last.

    Returns:
        The version's folder.

    Raises:
        InterflowError: the version was taken meanwhile.
    """
    folder = exports / card.name
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"{STAGED}*-*"):  # of a process that was killed
        pid = leftover.name.removeprefix(STAGED).partition("-")[0]
        if pid.isdecimal() and is_abandoned(int(pid)):
            shutil.rmtree(leftover, ignore_errors=True)
    stage = Path(tempfile.mkdtemp(prefix=f"{STAGED}{os.getpid()}-", dir=folder))
    try:
        stage.chmod(0o755)  # mkdtemp's 0700 would hide the model from a server that runs as another user
        (stage / MODEL_FILE).write_bytes(model)
        (stage / CARD_FILE).write_text(card.to_json(), encoding="utf-8")
        write_text(folder / CONFIG_FILE, config_pbtxt(card))  # the same for all versions, as their signatures are
        try:
            stage.rename(folder / card.version)
        except OSError as error:
            raise InterflowError(
                f"{folder / card.version} appeared meanwhile; export again for the next one."
            ) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return folder / card.version


def export_versions() -> dict[str, str]:
    """What the exported graph was made and checked with."""
    return {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}


def _signature(card: ModelCard) -> dict[str, str]:
    """All that a client of the model relies on, by name."""
    tensors = {f"input {name}": str(spec) for name, spec in card.inputs.items()}
    tensors |= {f"output {name}": str(spec) for name, spec in card.outputs.items()}
    return tensors | {f"class {index}": repr(label) for index, label in enumerate(card.classes)}


def _versions(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*") if re.fullmatch(VERSION_PATTERN, path.name) and path.is_dir()]
