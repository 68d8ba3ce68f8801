"""An artefact's graph cut behind each stage, in memory: run one after another, the pieces do what the whole does.

So an image whose answer is sure can stop there, and nothing of the deeper stages is computed for it. No torch here.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, ValueInfoProto, helper, numpy_helper

from model.contract import InterflowError, branch_map_name

CONFIDENCE_READ = "reading.confidence"
"""Output that `with_readings` adds."""
OWN_COPIES = {"DequantizeLinear"}
"""Each segment has its own: runtimes fuse it with the quantised layer behind it, and what crosses stays small."""


class CutError(InterflowError):
    """The graph cannot be cut at its stages."""


class Segment(NamedTuple):
    """The part of a graph from behind one cut up to and with the class maps in front of the next."""

    model: bytes
    """Serialised, weights inside."""
    inputs: tuple[str, ...]
    """The images, or what earlier segments gave; all with the images in dimension 0."""
    outputs: tuple[str, ...]
    """The class maps, and what later segments take."""
    branches: tuple[int, ...]
    """Whose class maps it makes, counted from 0, ascending."""


def cut(model: ModelProto, stages: int, behind: Collection[int] | None = None) -> list[Segment]:
    """Cut a graph behind stages.

    Each node goes to the shallowest stage whose class maps need it; what is made of the maps is left out. What does not
    hold images in dimension 0 (constants, shapes) is computed anew by each segment that needs it.

    Args:
        model: an artefact's; a file's weights are inside.
        stages: how many it has.
        behind: which it is cut behind, counted from 0; all where None. The last segment ends with the last stage.

    Returns:
        The segments, from shallow to deep.

    Raises:
        CutError: a stage needs what a deeper one makes, a node holds a graph of its own, or class maps are not one
            image after another.
    """
    graph = onnx.shape_inference.infer_shapes(model).graph
    infos = {info.name: info for info in (*graph.value_info, *graph.input, *graph.output)}
    makers = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    batch = graph.input[0].type.tensor_type.shape.dim[0].dim_param

    def holds_images(name: str) -> bool:
        shape = infos[name].type.tensor_type.shape if name in infos else None
        return bool(shape and shape.dim and shape.dim[0].dim_param == batch)

    def needed(name: str, given: set[str]) -> dict[str, NodeProto]:
        """The nodes that make a tensor of what is given, by the tensors that they make."""
        found: dict[str, NodeProto] = {}
        waiting = [name]
        while waiting:
            node = makers.get(name := waiting.pop())
            if node is not None and name not in given and name not in found:
                found |= dict.fromkeys(node.output, node)
                waiting += node.input
        return found

    if odd := next((node for node in graph.node if any(part.HasField("g") for part in node.attribute)), None):
        raise CutError(f"`{odd.name}` ({odd.op_type}) holds a graph of its own.")
    maps = [branch_map_name(branch) for branch in range(stages)]
    made: set[str] = {graph.input[0].name}
    """By earlier segments, of images."""
    parts: list[dict[str, NodeProto]] = []
    covered: list[tuple[int, ...]] = [()]
    for branch in range(stages):
        covered[-1] += (branch,)
        if branch + 1 < stages and (behind is None or branch in behind):
            covered.append(())
    for branches in covered:
        part: dict[str, NodeProto] = {}
        for name in [maps[branch] for branch in branches]:
            if not holds_images(name):
                raise CutError(f"`{name}` is not one image after another.")
            if name in made or name in part:
                raise CutError(f"`{name}` is made on the way to the class maps of a shallower stage.")
            part |= needed(name, made)
        parts.append(part)
        made |= {name for name, node in part.items() if holds_images(name) and node.op_type not in OWN_COPIES}
    taken = [{name for node in part.values() for name in node.input if name and name not in part} for part in parts]
    segments = []
    for place, part in enumerate(parts):
        later = set().union(*taken[place + 1 :])
        inputs = sorted(taken[place] - constants.keys())
        own = {maps[branch] for branch in covered[place]}
        outputs = [name for name in part if name in own or (name in later and name in made)]
        nodes = [node for node in graph.node if node.output[0] in part]
        used = {name for node in nodes for name in node.input}
        segments.append(
            Segment(
                _model(
                    model,
                    nodes,
                    [infos[name] for name in inputs],
                    [infos[name] for name in outputs],
                    [constants[name] for name in constants if name in used],
                ),
                tuple(inputs),
                tuple(outputs),
                covered[place],
            )
        )
    return segments


def with_readings(segment: Segment, reading_scales: Sequence[Sequence[float]]) -> Segment:
    """The same segment, which also says what its stages make of the images.

    Args:
        segment: of a cut graph.
        reading_scales: (B, K), of all stages.

    Returns:
        A segment with more outputs: the branch logits (N, K) of each of its stages, by `logits_read`, and the
        confidence (N,) of the last one's reading.
    """
    model = onnx.load_model_from_string(segment.model)
    last = segment.branches[-1]
    constants = {
        "places": np.array([2, 3]),
        "classes": np.array([1]),
        "scales": np.asarray(reading_scales[last], np.float32),
    }
    nodes: list[tuple[str, list[str], str, dict[str, Any]]] = [
        *(
            ("ReduceMean", [branch_map_name(branch), "reading.places"], logits_read(branch), {"keepdims": 0})
            for branch in segment.branches
        ),
        ("Mul", [logits_read(last), "reading.scales"], "reading.scaled", {}),
        ("Softmax", ["reading.scaled"], "reading.beliefs", {"axis": 1}),
        ("ReduceMax", ["reading.beliefs", "reading.classes"], CONFIDENCE_READ, {"keepdims": 0}),
    ]
    model.graph.initializer.extend(
        numpy_helper.from_array(array, f"reading.{name}") for name, array in constants.items()
    )
    model.graph.node.extend(helper.make_node(kind, given, [made], **options) for kind, given, made, options in nodes)
    batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    outputs = {logits_read(branch): [batch, len(reading_scales[last])] for branch in segment.branches}
    outputs[CONFIDENCE_READ] = [batch]
    model.graph.output.extend(
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in outputs.items()
    )
    return segment._replace(model=model.SerializeToString(), outputs=(*segment.outputs, *outputs))


def logits_read(branch: int) -> str:
    """Name of the output that `with_readings` adds for a branch, counted from 0."""
    return f"reading.logits.{branch}"


def _model(
    whole: ModelProto,
    nodes: list[NodeProto],
    inputs: list[ValueInfoProto],
    outputs: list[ValueInfoProto],
    constants: list[onnx.TensorProto],
) -> bytes:
    graph = helper.make_graph(nodes, whole.graph.name, inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=whole.opset_import, ir_version=whole.ir_version)
    model.functions.extend(whole.functions)
    return model.SerializeToString()
