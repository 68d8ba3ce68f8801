"""What can be evaluated: a run, through torch, or an artefact, through onnxruntime; asked the same way."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from model.contract import (
    BRANCH_LOGITS,
    BRANCH_WEIGHTS,
    CARD_FILE,
    IMAGE,
    LOGITS,
    METADATA_KEY,
    MODEL_FILE,
    InterflowError,
    ModelCard,
    branch_map_name,
)
from training.artefact import ServedNetwork
from training.finish import open_finished
from training.recipe import Recipe, load_recipe
from training.run import RUNS, Run


class Outputs(NamedTuple):
    """One forward pass over N images; B stages, K classes, all float32."""

    logits: np.ndarray
    """(N, K), fused, as the network gave them."""
    branch_logits: np.ndarray
    """(N, B, K)."""
    branch_weights: np.ndarray
    """(N, B, K)."""
    branch_maps: list[np.ndarray]
    """B class maps, (N, K, h, w)."""
    features: list[np.ndarray]
    """B tapped feature maps, (N, C, h, w): what the branches see."""


@dataclass(frozen=True)
class Subject:
    """A trained network, ready to be asked.

    Attributes:
        kind: through what it is run.
        folder: as it was given.
        card: describes it.
        recipe: of a run, with the data that it was trained on; an artefact has none.
        runtime: the library, its version and the device.
        forward: uint8 (N, height, width, channels) to all outputs.
    """

    kind: Literal["run", "artefact"]
    folder: Path
    card: ModelCard
    recipe: Recipe | None
    runtime: str
    forward: Callable[[np.ndarray], Outputs]


def open_subject(folder: Path, device: torch.device) -> Subject:
    """Open `runs/<run>` or `exports/<model>/<version>`.

    Args:
        folder: of either.
        device: that a run's network is run on. An artefact runs on the CPU.

    Raises:
        InterflowError: neither of the two, a run that is not finished, or files that do not fit together.
    """
    if (folder / MODEL_FILE).is_file() or (folder / CARD_FILE).is_file():
        return _artefact(folder)
    if Run(folder).recipe.is_file():
        return _run(Run(folder), device)
    raise InterflowError(
        f"{folder}: {_what_is_there(folder)}; give the folder of a run, such as {RUNS}/<run>, or of a model's version, "
        f"such as exports/<model>/<version>."
    )


def _what_is_there(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder"
    versions = sorted(path.parent.name for path in folder.glob(f"*/{MODEL_FILE}"))
    return f"a model of which there are the versions {', '.join(versions)}" if versions else "neither run nor model"


def _run(run: Run, device: torch.device) -> Subject:
    card, network = open_finished(run)
    served = ServedNetwork(network, card).to(device).eval()
    features: list[Tensor] = []

    def keep(_head: nn.Module, inputs: tuple[Tensor]) -> None:
        features.append(inputs[0])

    for head in network.heads.values():  # called once a stage, from shallow to deep, also where stages share one
        head.register_forward_pre_hook(keep)

    @torch.inference_mode()
    def forward(images: np.ndarray) -> Outputs:
        features.clear()
        tensors = dict(zip(card.outputs, served(torch.from_numpy(images).to(device)), strict=True))
        values = {name: tensor.float().cpu().numpy() for name, tensor in tensors.items()}
        return _outputs(values, card, [tensor.float().cpu().numpy() for tensor in features])

    runtime = f"torch {torch.__version__} on {device.type}"
    return Subject("run", run.folder, card, load_recipe(run.recipe), runtime, forward)


def _artefact(folder: Path) -> Subject:
    card_path, model_path = folder / CARD_FILE, folder / MODEL_FILE
    for path in (card_path, model_path):
        if not path.is_file():
            raise InterflowError(f"{folder}: has no {path.name}; export the model again.")
    text = card_path.read_bytes()
    card = ModelCard.from_json(text, card_path)
    try:
        session = _session(str(model_path))
        model = onnx.load(model_path)
        tapped = _tapped(model, len(card.stages))
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(tapped))
        # a graph of its own for the features, so that what is evaluated is the file as it is served
        features_session = _session(model.SerializeToString())
    except Exception as error:  # onnx's and onnxruntime's errors share no base class
        reason = str(error).splitlines()[0]
        raise InterflowError(f"{model_path}: not a model that can be run ({reason}); export it again.") from error
    if session.get_modelmeta().custom_metadata_map.get(METADATA_KEY) != text.decode():
        raise InterflowError(f"{card_path}: not the card that {model_path.name} was exported with; export it again.")
    names = list(card.outputs)

    def forward(images: np.ndarray) -> Outputs:
        values = dict(zip(names, session.run(names, {IMAGE: images}), strict=True))
        features = dict(zip(tapped, features_session.run(tapped, {IMAGE: images}), strict=True))
        return _outputs(values, card, [features[name] for name in tapped])

    runtime = f"onnxruntime {onnxruntime.__version__} on cpu"
    return Subject("artefact", folder, card, None, runtime, forward)


def _session(model: str | bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _tapped(model: onnx.ModelProto, branches: int) -> list[str]:
    """Names of the tensors that the class maps are convolutions of, one a branch: the tapped feature maps."""
    makers = {name: node for node in model.graph.node for name in node.output}
    convolutions = [makers[branch_map_name(branch)] for branch in range(branches)]
    if odd := next((node for node in convolutions if node.op_type != "Conv"), None):
        raise ValueError(f"{odd.output[0]} is made by {odd.op_type}, not by a convolution of the stage's features")
    return [node.input[0] for node in convolutions]


def _outputs(values: dict[str, np.ndarray], card: ModelCard, features: Sequence[np.ndarray]) -> Outputs:
    maps = [values[branch_map_name(branch)] for branch in range(len(card.stages))]
    return Outputs(values[LOGITS], values[BRANCH_LOGITS], values[BRANCH_WEIGHTS], maps, list(features))
