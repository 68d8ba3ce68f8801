"""Proof that an exported graph says what the trained network says, and that its sums are exact."""

from collections.abc import Callable

import numpy as np
import onnx
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
from model.cut import Segment, cut
from model.interflow import Interflow, Normalize
from training.artefact import ServedNetwork

BATCHES = (1, 2, 17)
TOLERANCE = 1e-4
"""Largest difference allowed, relative to the largest magnitude in the tensor or 1: float32 in another order."""
CUT_TOLERANCE = {"float32": 1e-5, "float16": 1e-3, "int8": 1e-5}
"""The same between a graph and its segments. In float16 a CPU rounds what crosses, but little within."""
MOST = 0.75
"""Share of the images that fewer bits must answer as PyTorch does; how many they lose of all is for `precision`."""

_ORT_TYPES = {"uint8": "tensor(uint8)", "float32": "tensor(float)"}


class VerificationError(InterflowError):
    """The artefact does not hold what it promises; it is not written."""


def verify(model: bytes, card: ModelCard, network: Interflow, tensors: dict[str, Tensor], samples: np.ndarray) -> float:
    """Run the graph on real images and compare every output, at batches of 1, 2 and 17.

    Checked: the graph's signature is the card's; the fused logits are the weighted sum of the branch logits; these are
    the means of the class maps; the layers' own shares sum to 1; the branch weights are the card's. In float32 also:
    ONNX = PyTorch; and all equal pooling, linear layer and sum done independently, in float64, on the backbone's
    features with the checkpoint's tensors and the card's weights. (The graph holds the identities by how it is built,
    so that the graph alone would prove nothing.) In fewer bits the same is done on the graph's own features, and its
    answers are those of PyTorch for most of the images. Where the card has `exits`, the graph cut behind each stage
    gives what the whole gives.

    Args:
        model: the serialised graph.
        card: describes it.
        network: the trained network, in evaluation mode on the CPU.
        tensors: the network's, by name, as the checkpoint holds them.
        samples: uint8 (20 or more, height, width, channels).

    Returns:
        The largest relative difference found between what must be equal.

    Raises:
        VerificationError: names the batch and the comparison that failed, and by how much.
    """
    session = open_graph(model)
    _require_signature(session, card)
    exact = card.precision == "float32"
    features_of = None if exact else _features(model, len(card.stages))
    whole = onnx.load_model_from_string(model)
    segments = cut(whole, len(card.stages)) if card.exits else []
    parts = [(segment, open_graph(segment.model)) for segment in segments]

    worst, start, agreeing = 0.0, 0, 0
    for batch in BATCHES:
        images = samples[start : start + batch]
        start += batch
        served = dict(zip(card.outputs, session.run(list(card.outputs), {IMAGE: images}), strict=True))
        by_pytorch = _by_pytorch(network, card, images)
        agreeing += int((served[LOGITS].argmax(axis=1) == by_pytorch[LOGITS].argmax(axis=1)).sum())
        features = _by_backbone(network, card, images) if features_of is None else features_of(images)
        comparisons = [
            ("the sums of its own outputs", _by_identity(served, card), TOLERANCE),
            ("pooling, linear layer and sum in float64", _by_hand(network, tensors, card, features), TOLERANCE),
        ]
        if exact:
            comparisons.append(("PyTorch", by_pytorch, TOLERANCE))
        if parts:
            comparisons.append(
                ("the graph cut in segments", _by_segments(parts, card, images), CUT_TOLERANCE[card.precision])
            )
        for reference, outputs, tolerance in comparisons:
            for name, expected in outputs.items():
                difference = _difference(served[name], expected)
                if not difference <= tolerance:
                    raise VerificationError(
                        f"batch {batch}: {name} differs from {reference} by {difference:.2g} of its scale; "
                        f"{tolerance:g} is allowed. The artefact is not written."
                    )
                worst = max(worst, difference)
    if agreeing < MOST * start:
        raise VerificationError(
            f"of {start} images {agreeing} have the answer of PyTorch in {card.precision}, and at least {MOST:.0%} "
            f"should. The artefact is not written."
        )
    return worst


def open_graph(model: bytes) -> onnxruntime.InferenceSession:
    """A session on the CPU that says errors only."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def residuals(served: dict[str, np.ndarray], card: ModelCard) -> dict[str, float]:
    """By how much what must be equal differs in a graph's own outputs: the exact sums, and the layers' shares.

    Args:
        served: all outputs, by name.
        card: describes the graph.

    Returns:
        For each output that is a sum the largest difference, relative to the largest magnitude, or 1.
    """
    return {name: _difference(served[name], expected) for name, expected in _by_identity(served, card).items()}


def _difference(got: np.ndarray, expected: np.ndarray) -> float:
    """Relative to the largest magnitude, or 1; infinite where the shapes differ."""
    if got.shape != expected.shape:
        return np.inf
    return float(np.abs(got - expected).max()) / max(1.0, float(np.abs(expected).max()))


def _require_signature(session: onnxruntime.InferenceSession, card: ModelCard) -> None:
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


def _features(model: bytes, stages: int) -> Callable[[np.ndarray], list[Tensor]]:
    """What the branches of a graph see: its own feature maps, from images."""
    graph = onnx.load_model_from_string(model)
    makers = {name: node for node in graph.graph.node for name in node.output}
    names = [makers[branch_map_name(branch)].input[0] for branch in range(stages)]
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names))
    session = open_graph(graph.SerializeToString())
    return lambda images: [torch.from_numpy(value) for value in session.run(names, {IMAGE: images})]


def _by_segments(
    parts: list[tuple[Segment, onnxruntime.InferenceSession]], card: ModelCard, images: np.ndarray
) -> dict[str, np.ndarray]:
    """The class maps, from the segments one after another."""
    values = {IMAGE: images}
    for segment, session in parts:
        made = session.run(list(segment.outputs), {name: values[name] for name in segment.inputs})
        values |= dict(zip(segment.outputs, made, strict=True))
    return {name: values[name] for name in card.outputs if name in values}


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
def _by_backbone(network: Interflow, card: ModelCard, images: np.ndarray) -> list[Tensor]:
    return network.features(Normalize(card.input.mean, card.input.std)(torch.from_numpy(images))).maps


@torch.inference_mode()
def _by_hand(
    network: Interflow, tensors: dict[str, Tensor], card: ModelCard, features: list[Tensor]
) -> dict[str, np.ndarray]:
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
    every_image = weights.expand(len(features[0]), -1, -1)
    return {LOGITS: fused.numpy(), BRANCH_LOGITS: branch_logits.numpy(), BRANCH_WEIGHTS: every_image.numpy()}
