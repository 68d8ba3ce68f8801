"""An artefact's graph cut behind each stage, in memory: run one after another, the pieces do what the whole does.

So an image whose answer is sure can stop there, and nothing of the deeper stages is computed for it. No torch here.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, ValueInfoProto, helper, numpy_helper

from model.contract import InterflowError, branch_map_name

READING = ("reading.logits", "reading.confidence")
"""Outputs that `with_reading` adds."""
OWN_COPIES = {"DequantizeLinear"}
"""Each segment has its own: runtimes fuse it with the quantised layer behind it, and what crosses stays small."""


class CutError(InterflowError):
    """The graph cannot be cut at its stages."""


class Segment(NamedTuple):
    """The part of a graph from behind one stage up to and with the next one's class maps; the last: all the rest."""

    model: bytes
    """Serialised, weights inside."""
    inputs: tuple[str, ...]
    """The images, or what earlier segments gave; all with the images in dimension 0."""
    outputs: tuple[str, ...]
    """What later segments take, and those outputs of the whole graph that are made here."""


def cut(model: ModelProto, stages: int) -> list[Segment]:
    """Cut a graph behind each of its stages.

    Each node goes to the shallowest stage whose class maps need it; what is made of these maps, to the shallowest that
    has them all. What does not hold images in dimension 0 (constants, shapes) is computed anew by each segment that
    needs it.

    Args:
        model: an artefact's; a file's weights are inside.
        stages: how many it has.

    Returns:
        One segment a stage, from shallow to deep.

    Raises:
        CutError: a stage needs what a deeper one makes, a node holds a graph of its own, or an output is not one image
            after another.
    """
    graph = onnx.shape_inference.infer_shapes(model).graph
    infos = {info.name: info for info in (*graph.value_info, *graph.input, *graph.output)}
    makers = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    batch = graph.input[0].type.tensor_type.shape.dim[0].dim_param

    def holds_images(name: str) -> bool:
        shape = infos[name].type.tensor_type.shape if name in infos else None
        return bool(shape and shape.dim and shape.dim[0].dim_param == batch)

    def needed(names: Iterable[str], given: set[str]) -> dict[str, NodeProto]:
        """The nodes that make these tensors of what is given, by the tensors that they make."""
        found: dict[str, NodeProto] = {}
        waiting = list(names)
        while waiting:
            node = makers.get(name := waiting.pop())
            if node is not None and name not in given and name not in found:
                found |= dict.fromkeys(node.output, node)
                waiting += node.input
        return found

    if odd := next((node for node in graph.node if any(part.HasField("g") for part in node.attribute)), None):
        raise CutError(f"`{odd.name}` ({odd.op_type}) holds a graph of its own.")
    finals = [output.name for output in graph.output]
    maps = [branch_map_name(branch) for branch in range(stages)]
    made: set[str] = {graph.input[0].name}
    """By earlier segments, of images."""
    trunk = {name: node for name, node in needed(maps, made).items() if holds_images(name)}
    followers = [name for name in needed(finals, made | trunk.keys()) if holds_images(name)]
    parts: list[dict[str, NodeProto]] = []
    for branch, name in enumerate(maps):
        part = needed([name] if branch + 1 < stages else finals, made)
        if name not in part:
            raise CutError(f"the class maps of stage {branch + 1} are there before those of stage {branch}.")
        for follower in followers:
            found = needed([follower], made | part.keys())
            if not found.keys() & trunk.keys():
                part |= found
        parts.append(part)
        made |= {name for name, node in part.items() if holds_images(name) and node.op_type not in OWN_COPIES}

    taken = [{name for node in part.values() for name in node.input if name and name not in part} for part in parts]
    segments = []
    for place, part in enumerate(parts):
        later = set().union(*taken[place + 1 :])
        inputs = sorted(taken[place] - constants.keys())
        outputs = [name for name in part if name in finals or (name in later and name in made)]
        if odd := next((name for name in (*inputs, *outputs) if not holds_images(name)), None):
            raise CutError(f"`{odd}` is not one image after another.")
        nodes = [node for node in graph.node if node.output[0] in part]
        used = {name for node in nodes for name in node.input}
        segments.append(
            _segment(
                model,
                nodes,
                [infos[name] for name in inputs],
                [infos[name] for name in outputs],
                [constants[name] for name in constants if name in used],
            )
        )
    return segments


def with_reading(segment: Segment, branch: int, reading_scales: Sequence[float]) -> Segment:
    """The same segment, which also says how sure its stage is.

    Args:
        segment: holds the class maps of the branch.
        branch: counted from 0.
        reading_scales: (K,), of the branch.

    Returns:
        A segment with two outputs more, at the end: the branch logits (N, K), and the confidence (N,) of the reading.
    """
    model = onnx.load_model_from_string(segment.model)
    constants = {
        "places": np.array([2, 3]),
        "classes": np.array([1]),
        "scales": np.asarray(reading_scales, np.float32),
    }
    nodes: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("ReduceMean", [branch_map_name(branch), "reading.places"], "reading.logits", {"keepdims": 0}),
        ("Mul", ["reading.logits", "reading.scales"], "reading.scaled", {}),
        ("Softmax", ["reading.scaled"], "reading.beliefs", {"axis": 1}),
        ("ReduceMax", ["reading.beliefs", "reading.classes"], "reading.confidence", {"keepdims": 0}),
    ]
    model.graph.initializer.extend(
        numpy_helper.from_array(array, f"reading.{name}") for name, array in constants.items()
    )
    model.graph.node.extend(helper.make_node(kind, given, [made], **options) for kind, given, made, options in nodes)
    batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    outputs = dict(zip(READING, ([batch, len(reading_scales)], [batch]), strict=True))
    model.graph.output.extend(
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in outputs.items()
    )
    return Segment(model.SerializeToString(), segment.inputs, (*segment.outputs, *outputs))


def _segment(
    whole: ModelProto,
    nodes: list[NodeProto],
    inputs: list[ValueInfoProto],
    outputs: list[ValueInfoProto],
    constants: list[onnx.TensorProto],
) -> Segment:
    graph = helper.make_graph(nodes, whole.graph.name, inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=whole.opset_import, ir_version=whole.ir_version)
    model.functions.extend(whole.functions)
    names = (tuple(info.name for info in infos) for infos in (inputs, outputs))
    return Segment(model.SerializeToString(), *names)
