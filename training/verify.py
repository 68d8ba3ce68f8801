"""Proof that an exported graph says what the trained network says, and that its sums are exact."""

import numpy as np
import onnxruntime
import torch
from torch import Tensor
from torch.nn import functional

from model.contract import (
    BRANCH_LOGITS,
    BRANCH_WEIGHTS,
    IMAGE,
    LAYER_ATTENTION,
    LOGITS,
    InterflowError,
    ModelCard,
    branch_map_name,
)
from model.interflow import Interflow, Normalize
from training.artefact import ServedNetwork

BATCHES = (1, 2, 17)
TOLERANCE = 1e-4
"""Largest difference allowed, relative to the largest magnitude in the tensor or 1: float32 in another order."""

_ORT_TYPES = {"uint8": "tensor(uint8)", "float32": "tensor(float)"}


class VerificationError(InterflowError):
    """The artefact does not hold what it promises; it is not written."""


def verify(model: bytes, card: ModelCard, network: Interflow, tensors: dict[str, Tensor], samples: np.ndarray) -> float:
    """Run the graph on real images and compare every output, at batches of 1, 2 and 17.

    Checked: the graph's signature is the card's; ONNX = PyTorch; the fused logits are the weighted sum of the branch
    logits; these are the means of the class maps; the layers' own shares sum to 1; and all equal pooling, linear layer
    and sum done independently, in float64, on the backbone's features with the checkpoint's tensors and the card's
    weights. (The graph holds the identities by how it is built, so that the graph alone would prove nothing.)

    Args:
        model: the serialised graph.
        card: describes it.
        network: the trained network, in evaluation mode on the CPU.
        tensors: the network's, by name, as the checkpoint holds them.
        samples: uint8 (20 or more, height, width, channels).

    Returns:
        The largest relative difference found.

    Raises:
        VerificationError: names the batch and the comparison that failed, and by how much.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    for kind, nodes, expected in (
        ("input", session.get_inputs(), card.inputs),
        ("output", session.get_outputs(), card.outputs),
    ):
        found = {node.name: (node.type, [s if isinstance(s, int) else None for s in node.shape]) for node in nodes}
        promised = {name: (_ORT_TYPES[spec.dtype], list(spec.shape)) for name, spec in expected.items()}
        for name in found | promised:
            if found.get(name) != promised.get(name):
                raise VerificationError(
                    f"the graph's {kind} {name} is {found.get(name)}, but the card promises {promised.get(name)}."
                )

    worst, start = 0.0, 0
    for batch in BATCHES:
        images = samples[start : start + batch]
        start += batch
        served = dict(zip(card.outputs, session.run(list(card.outputs), {IMAGE: images}), strict=True))
        for reference, outputs in (
            ("PyTorch", _by_pytorch(network, card, images)),
            ("the sums of its own outputs", _by_identity(served, card)),
            ("pooling, linear layer and sum in float64", _by_hand(network, tensors, card, images)),
        ):
            for name, expected_values in outputs.items():
                scale = max(1.0, float(np.abs(expected_values).max()))
                difference = float(np.abs(served[name] - expected_values).max()) / scale
                if not difference <= TOLERANCE or served[name].shape != expected_values.shape:
                    raise VerificationError(
                        f"batch {batch}: {name} differs from {reference} by {difference:.2g} of its scale; "
                        f"{TOLERANCE:g} is allowed. The artefact is not written."
                    )
                worst = max(worst, difference)
    return worst


@torch.inference_mode()
def _by_pytorch(network: Interflow, card: ModelCard, images: np.ndarray) -> dict[str, np.ndarray]:
    tensors = ServedNetwork(network, card)(torch.from_numpy(images))
    return {name: tensor.numpy() for name, tensor in zip(card.outputs, tensors, strict=True)}


def _by_identity(served: dict[str, np.ndarray], card: ModelCard) -> dict[str, np.ndarray]:
    maps = [served[branch_map_name(i)].mean(axis=(2, 3)) for i in range(len(card.stages))]
    identities = {
        LOGITS: (served[BRANCH_WEIGHTS] * served[BRANCH_LOGITS]).sum(axis=1),
        BRANCH_LOGITS: np.stack(maps, axis=1),
    }
    if card.layer_attention:
        identities[LAYER_ATTENTION] = _shares_sum_to_1(served[LAYER_ATTENTION], card)
    return identities


def _shares_sum_to_1(attention: np.ndarray, card: ModelCard) -> np.ndarray:
    """The same numbers, rows of shares brought to the sum 1, gates to 0..1, and zero where there is no source."""
    expected = np.zeros_like(attention)
    for i, row in enumerate(card.layer_attention):
        values = attention[:, i, : len(row.sources)].clip(0, 1)
        expected[:, i, : len(row.sources)] = (
            values / values.sum(axis=1, keepdims=True) if row.kind == "share" else values
        )
    return expected


@torch.inference_mode()
def _by_hand(
    network: Interflow, tensors: dict[str, Tensor], card: ModelCard, images: np.ndarray
) -> dict[str, np.ndarray]:
    pixels = torch.from_numpy(images)
    features = network.features(Normalize(card.input.mean, card.input.std)(pixels)).maps
    branch_logits = torch.stack(
        [
            functional.linear(
                feature.double().mean(dim=(2, 3)),
                tensors[f"heads.{head}.weight"].double().flatten(1),
                tensors[f"heads.{head}.bias"].double(),
            )
            for head, feature in zip(network.head_names, features, strict=True)
        ],
        dim=1,
    )
    weights = torch.tensor(card.branch_weights, dtype=torch.float64)
    fused = torch.einsum("bk,nbk->nk", weights, branch_logits)
    every_image = weights.expand(len(images), -1, -1)
    return {LOGITS: fused.numpy(), BRANCH_LOGITS: branch_logits.numpy(), BRANCH_WEIGHTS: every_image.numpy()}
