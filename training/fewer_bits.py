"""A graph's trunk in float16 or int8; what the exact sums are made of stays float32.

The trunk is all from the normalised image up to the feature maps that the branches see. Before it lies the
normalisation; behind it lie class maps, pooling and fusion, so that the logits are the exact sums that they always are.
"""

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, NodeProto, numpy_helper
from onnx.compose import add_prefix
from onnx.utils import Extractor

from model.contract import IMAGE, InterflowError, branch_map_name
from model.cpu import cpu_features

CPU = "CPUExecutionProvider"
NORMALIZE_LAST = "normalize.std"
"""Constant of the last step of the normalisation (`training.artefact.ServedNetwork`)."""

QUANTISED = ("Conv", "Gemm", "MatMul", "Relu", "Clip", "MaxPool", "Add", "Concat")
"""Operators in int8, those that onnxruntime has kernels for; MatMul by constant matrices only."""
CALIBRATION_BATCH = 16
VNNI = {"avx_vnni", "avx512_vnni", "amx_int8"}
"""Any of these, and int8 products are summed in 32 bits."""


def to_float16(model: ModelProto, stages: int) -> ModelProto:
    """The same graph with its trunk in float16, types of inputs and outputs as they were.

    Args:
        model: as `training.artefact.to_graph` makes it; it is left as it is.
        stages: how many it has.
    """
    from onnxruntime.quantization.onnx_model import ONNXModel  # noqa: PLC0415 - slow to import
    from onnxruntime.transformers.float16 import (  # noqa: PLC0415 - slow to import
        DEFAULT_OP_BLOCK_LIST,
        convert_float_to_float16,
    )

    parts = _split(model, stages)
    with _quiet():
        # Softmax: exponentials overflow, and shares must sum to 1
        trunk = convert_float_to_float16(
            parts.trunk, keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, "Softmax"]
        )
    ONNXModel(trunk).topological_sort()
    return _joined(model, parts._replace(trunk=trunk))


def to_int8(model: ModelProto, stages: int, images: np.ndarray) -> ModelProto:
    """The same graph with its trunk in int8: static QDQ, weights with a scale per channel, ranges from least to most.

    Args:
        model: as `training.artefact.to_graph` makes it; it is left as it is.
        stages: how many it has.
        images: uint8 (M, height, width, channels), real ones: activations get the ranges that they have on these.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static  # noqa: PLC0415 - slow to import
    from onnxruntime.quantization.shape_inference import quant_pre_process  # noqa: PLC0415 - the same

    parts = _split(model, stages)
    features = set(cpu_features())
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        whole, prepared, quantised = (Path(folder) / f"{name}.onnx" for name in ("whole", "prepared", "quantised"))
        onnx.save_model(parts.trunk, whole)
        quant_pre_process(whole, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            quantised,
            _Reader(parts, images),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTISED),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            # Without VNNI, x86 adds two products in 16 bits, and they may not fit: onnxruntime advises weights of 7
            # bits. We make what is best for this CPU; the card names its features, the server warns where they lack.
            reduce_range="avx2" in features and not VNNI & features,
            extra_options={"MatMulConstBOnly": True},
        )
        trunk = onnx.load_model(quantised)
    if "amx_int8" in features:
        _move_zero_points(trunk)
    return _joined(model, parts._replace(trunk=trunk))


class _Parts(NamedTuple):
    """A graph in three."""

    front: ModelProto
    """From the image to what enters the trunk."""
    trunk: ModelProto
    """The part that is reduced."""
    back: list[NodeProto]
    """All the rest."""


class _Reader:
    """What enters the trunk, a batch of images at a time, as the quantiser asks for it."""

    def __init__(self, parts: _Parts, images: np.ndarray) -> None:
        self._session = onnxruntime.InferenceSession(parts.front.SerializeToString(), providers=[CPU])
        self._names = [value.name for value in parts.front.graph.output]
        self._with_image = any(value.name == IMAGE for value in parts.trunk.graph.input)
        self._batches = iter([images[i : i + CALIBRATION_BATCH] for i in range(0, len(images), CALIBRATION_BATCH)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        if batch is None:
            return None
        values = dict(zip(self._names, self._session.run(self._names, {IMAGE: batch}), strict=True))
        return values | ({IMAGE: batch} if self._with_image else {})


def _split(model: ModelProto, stages: int) -> _Parts:
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    start = next((node.output[0] for node in graph.node if NORMALIZE_LAST in node.input), None)
    if start is None:
        raise InterflowError(f"the graph holds no {NORMALIZE_LAST}: its normalisation is not where it was put.")
    inside: set[str] = set()
    entering: set[str] = set()
    waiting = [makers[branch_map_name(branch)].input[0] for branch in range(stages)]
    while waiting:
        name = waiting.pop()
        if name in (start, IMAGE):
            entering.add(name)
        elif name in makers and name not in inside:
            inside |= set(makers[name].output)
            waiting += makers[name].input
    outside = [node for node in graph.node if node.output[0] not in inside]
    taken = {name for node in outside for name in node.input} | {output.name for output in graph.output}
    leaving = [name for node in graph.node for name in node.output if name in inside and name in taken]
    extractor = Extractor(onnx.shape_inference.infer_shapes(model))
    front = extractor.extract_model([IMAGE], [start])
    made_first = {node.output[0] for node in front.graph.node}
    return _Parts(
        front=front,
        trunk=extractor.extract_model(sorted(entering), leaving),
        back=[node for node in outside if node.output[0] not in made_first],
    )


def _joined(model: ModelProto, parts: _Parts) -> ModelProto:
    """The parts as one graph, with the inputs and outputs of `model`."""
    # constants by names of their own: around the trunk the same ones may be of another type
    trunk = add_prefix(
        parts.trunk, "trunk.", rename_nodes=False, rename_edges=False, rename_inputs=False, rename_outputs=False,
        rename_value_infos=False, rename_initializers=True,
    )  # fmt: skip
    nodes = [*parts.front.graph.node, *trunk.graph.node, *parts.back]
    finals = {value.name for value in model.graph.output}
    around = {name for node in (*parts.front.graph.node, *parts.back) for name in node.input}
    graph = onnx.helper.make_graph(
        nodes,
        model.graph.name,
        list(model.graph.input),
        list(model.graph.output),
        [*trunk.graph.initializer, *(tensor for tensor in model.graph.initializer if tensor.name in around)],
        value_info=[*trunk.graph.value_info, *(value for value in trunk.graph.output if value.name not in finals)],
    )
    domains = {node.domain for node in nodes}
    versions = {opset.domain: opset for opset in (*model.opset_import, *trunk.opset_import) if opset.domain in domains}
    joined = onnx.helper.make_model(
        graph, opset_imports=list(versions.values()), ir_version=max(model.ir_version, trunk.ir_version)
    )
    joined.functions.extend(model.functions)
    onnx.checker.check_model(joined, full_check=True)
    return joined


def _move_zero_points(model: ModelProto) -> None:
    """Store the weights of convolutions one lower, and their zero as -1: the same numbers, to the last bit.

    Where their zero is 0, onnxruntime (1.31) convolves directly, by VNNI; else it multiplies matrices, by AMX, which
    took 0.37 ms instead of 0.47 for the convolutions of the CIFAR-10 model. The quantiser's weights are in -127..127.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    moved: set[str] = set()
    for node in model.graph.node:
        dense = node.op_type == "Conv" and all(a.i == 1 for a in node.attribute if a.name == "group")
        weights = makers.get(node.input[1]) if dense else None
        if weights is None or weights.op_type != "DequantizeLinear":
            continue
        for name in (weights.input[0], weights.input[2]):
            values = numpy_helper.to_array(constants[name])
            if name not in moved and values.dtype == np.int8:
                constants[name].CopyFrom(numpy_helper.from_array(values - np.int8(1), name))
                moved.add(name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep onnxruntime's tools from printing, warning and logging."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    onnxruntime.set_default_logger_severity(3)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        onnxruntime.set_default_logger_severity(2)
        logging.disable(level)
