"""The networks that `benchmarks/accelerator.py` measures: as artefacts, as PyTorch modules, and what they compute."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.material import crops, read_card, to_jpeg
from model.contract import MODEL_FILE, InputSpec, ModelCard
from model.cpu import cpu_features
from model.images import read_input
from model.interflow import Interflow, Normalize
from model.registry import create_model
from training.artefact import network_of, to_onnx, with_card, write_artefact
from training.fewer_bits import to_float16

CLASSES = 100
"""Of the large network: with 1,000, the class maps of its first stage alone were 12 MB an image."""
SEEN = 16
"""Photographs that its batch norms have seen."""


def photographs(spec: InputSpec, count: int) -> tuple[list[bytes], np.ndarray]:
    """JPEGs of the network's size, and their pixels as it reads them, uint8 (N, H, W, C)."""
    files = [to_jpeg(crop, spec.height) for crop in islice(crops(), count)]
    return files, np.stack([read_input(file, spec) for file in files])


def make_large(exports: Path, side: int, width: float) -> Path:
    """A ResNet-50 S3 of random weights, whose batch norms have seen photographs, or the numbers would grow."""
    torch.manual_seed(0)
    network = create_model("resnet50", method="S3", num_classes=CLASSES, in_channels=3, width=width)
    spec = InputSpec(height=side, width=side, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3, resize="squash")
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all that it sees
    with torch.no_grad():
        seen = Normalize(spec.mean, spec.std)(torch.from_numpy(photographs(spec, SEEN)[1]))
        maps = network.train()(seen).branch_maps
    card = _card("resnet50", spec, network.eval(), [tuple(branch.shape[2:]) for branch in maps], width)
    return write_artefact(exports, card, to_onnx(network, card))


def make_half(folder: Path, exports: Path) -> Path:
    """An artefact's twin in float16, without the figures that `training/export.py` measures."""
    card = read_card(folder)
    same = {name: getattr(card.metrics, name) for name in ("accuracy", "branch_accuracy")}
    against = same | {"agreement": 1, "branch_agreement": [1] * len(card.stages), "residual": 0, "cpu": cpu_features()}
    changes = {"name": f"{card.name}-fp16", "precision": "float16", "against_float32": against}
    half = ModelCard.model_validate(card.model_dump() | changes)
    graph = to_float16(onnx.load(folder / MODEL_FILE), len(card.stages))
    return write_artefact(exports, half, with_card(graph, half))


def torch_call(card: ModelCard, *, half: bool, compiled: str | None, device: torch.device) -> Callable[..., Any]:
    """The same network in PyTorch, of random weights: uint8 (N, H, W, C) on the CPU to its logits there.

    Args:
        card: describes it.
        half: in float16, else in float32 (or TF32, as PyTorch is told).
        compiled: mode of `torch.compile`; None: eager.
        device: to run on.
    """
    dtype = torch.float16 if half else torch.float32
    network = network_of(card).to(device, dtype).to(memory_format=torch.channels_last)
    normalize = Normalize(card.input.mean, card.input.std).to(device)

    def forward(images: torch.Tensor) -> torch.Tensor:
        return network(normalize(images).to(dtype)).logits

    run = forward if compiled is None else torch.compile(forward, mode=compiled)

    @torch.inference_mode()
    def call(images: torch.Tensor) -> torch.Tensor:
        return run(images.to(device, non_blocking=True)).float().cpu()

    return call


def flops_per_image(card: ModelCard) -> float:
    """Of the forward pass, two for a multiplication with its addition; convolutions and matrices only."""
    spec = card.input
    with FlopCounterMode(display=False) as counter:
        network_of(card)(torch.zeros(1, spec.channels, spec.height, spec.width))
    return float(counter.get_total_flops())


def traffic(folder: Path) -> tuple[float, float]:
    """Bytes that must cross the GPU's memory at least: an image's, and a batch's, which are the weights.

    What a convolution, a pooling or a product reads and writes once; all else counts as fused with these.
    """
    graph = onnx.shape_inference.infer_shapes(onnx.load(folder / MODEL_FILE)).graph
    infos = {info.name: info.type.tensor_type for info in (*graph.value_info, *graph.input, *graph.output)}
    images = 0.0
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul", "MaxPool", "ReduceMean", "GlobalAveragePool"):
            images += sum(_bytes(infos[name]) for name in (node.input[0], *node.output) if name in infos)
    weights = sum(len(tensor.raw_data) for tensor in graph.initializer)
    return images, float(weights)


def _bytes(tensor: Any) -> int:
    sizes = [dim.dim_value or 1 for dim in tensor.shape.dim]
    return int(np.prod(sizes)) * onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize


def _card(
    name: str, spec: InputSpec, network: Interflow, map_sizes: Sequence[tuple[int, ...]], width: float
) -> ModelCard:
    branches = len(network.stages)
    weights = network.attention.matrix().detach()
    return ModelCard.model_validate(
        {
            "name": name,
            "version": "1",
            "classes": [f"class {number}" for number in range(CLASSES)],
            "input": spec.model_dump(),
            "backbone": {"name": name, "depth": network.stages[-1].depth, "width": width},
            "method": {
                "name": "S3",
                "attention": "class",
                "initial_weights": "random",
                "learned": True,
                "shared_heads": True,
            },
            "stages": [
                {"name": stage.name, "depth": stage.depth, "channels": stage.channels, "map_size": size}
                for stage, size in zip(network.stages, map_sizes, strict=True)
            ],
            "branch_weights": weights.expand(branches, CLASSES).tolist(),
            "reading_scales": [[1.0] * CLASSES] * branches,
            "temperature": 1.0,
            "branch_importance": [1 / branches] * branches,
            "fitted_on": "nothing",
            "metrics": {
                "data": "none",
                "split": "test",
                "images": 1,
                "seed": 0,
                "accuracy": 0.0,
                "branch_accuracy": [0.0] * branches,
                "ece": 0.0,
                "branch_ece": [0.0] * branches,
            },
            "provenance": {
                "created": datetime.now(UTC).isoformat(),
                "run": "random weights",
                "weights_sha256": "0" * 64,
                "git_revision": None,
                "versions": {},
            },
        }
    )
