"""A graph cut at its taps does what it does whole. Runs with torch installed and without."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from model.contract import CARD_FILE, IMAGE, MODEL_FILE, ModelCard, branch_map_name
from model.cut import CONFIDENCE_READ, CutError, cut, logits_read, with_readings
from model.explain import readings
from model.images import read_input

EXPORTS = Path(__file__).parents[2] / "exports"


def session(model):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_pieces(segments, images, goes_on=None):
    """All outputs of the segments; behind each, only images that `goes_on(stage)` says are kept."""
    held, outputs = {IMAGE: images}, {}
    for stage, segment in enumerate(segments):
        values = session(segment.model).run(list(segment.outputs), {name: held[name] for name in segment.inputs})
        held |= dict(zip(segment.outputs, values, strict=True))
        outputs |= held
        if goes_on is not None:
            held = {name: value[goes_on(stage)] for name, value in held.items()}
    return outputs


@pytest.fixture(params=["digits", "cifar10", "cifar10-int8"])
def bundled_model(request, photographs):
    """The graph, its card, and real images as it takes them."""
    folder = EXPORTS / request.param / "1"
    card = ModelCard.from_json((folder / CARD_FILE).read_bytes(), folder)
    images = np.stack([read_input(path.read_bytes(), card.input) for path in photographs.values()])
    return folder / MODEL_FILE, card, images


def maps_of(card):
    return [branch_map_name(branch) for branch in range(len(card.stages))]


@pytest.mark.parametrize("behind", [None, [1], [0, 2], []])
def test_the_pieces_give_what_the_whole_gives(bundled_model, behind):
    path, card, images = bundled_model
    segments = cut(onnx.load(path), len(card.stages), behind)
    assert len(segments) == (len(card.stages) if behind is None else 1 + len(behind))
    whole = session(path)
    for batch in (images[:1], images):
        expected = dict(zip(card.outputs, whole.run(list(card.outputs), {IMAGE: batch}), strict=True))
        outputs = run_pieces([with_readings(segment, card.reading_scales) for segment in segments], batch)
        for name in maps_of(card):
            np.testing.assert_array_equal(outputs[name], expected[name])
        for branch in range(len(card.stages)):
            logits = expected["branch_logits"][:, branch]
            np.testing.assert_allclose(outputs[logits_read(branch)], logits, rtol=1e-5, atol=1e-5)


def test_each_piece_says_how_sure_its_last_stage_is(bundled_model):
    path, card, images = bundled_model
    beliefs = readings(session(path).run(["branch_logits"], {IMAGE: images})[0], card.reading_scales)
    held = {IMAGE: images}
    for segment in cut(onnx.load(path), len(card.stages), [0, 1]):
        reading = with_readings(segment, card.reading_scales)
        values = session(reading.model).run(list(reading.outputs), {name: held[name] for name in reading.inputs})
        held |= dict(zip(reading.outputs, values, strict=True))
        expected = beliefs[:, segment.branches[-1]].max(axis=1)
        np.testing.assert_allclose(held[CONFIDENCE_READ], expected, rtol=1e-4, atol=1e-5)


def test_images_that_go_on_are_not_touched_by_those_that_stop(bundled_model):
    path, card, images = bundled_model
    kept = [[1, 2, 4], [0, 2], [1], []]  # of what each stage saw: so image 4 alone reaches the last one
    outputs = run_pieces(cut(onnx.load(path), len(card.stages)), images, kept.__getitem__)
    names = maps_of(card)
    expected = dict(zip(names, session(path).run(names, {IMAGE: images[4:5]}), strict=True))
    np.testing.assert_allclose(outputs[names[-1]], expected[names[-1]], rtol=1e-4, atol=1e-4)


def test_no_weight_is_in_two_pieces(bundled_model):
    path, card, _ = bundled_model
    segments = cut(onnx.load(path), len(card.stages))
    graphs = [onnx.load_model_from_string(segment.model).graph for segment in segments]
    weights = [tensor.name for graph in graphs for tensor in graph.initializer if np.prod(tensor.dims) > 10_000]
    assert len(weights) == len(set(weights)) >= len(card.stages)
    assert sum(len(segment.model) for segment in segments) < 1.02 * path.stat().st_size


def test_a_deeper_stage_is_not_in_a_shallower_piece(bundled_model):
    path, card, _ = bundled_model
    sizes = [len(segment.model) for segment in cut(onnx.load(path), len(card.stages))]
    convolutions = [
        sum(node.op_type == "Conv" for node in onnx.load_model_from_string(segment.model).graph.node)
        for segment in cut(onnx.load(path), len(card.stages))
    ]
    depths = [0, *(stage.depth for stage in card.stages)]
    assert convolutions == [1 + deep - shallow for shallow, deep in pairwise(depths)]
    assert sizes == sorted(sizes)


def two_stages(shape_between, nodes):
    """A graph of two stages of one 1x1 map each, `tap` between them."""
    image = helper.make_tensor_value_info(IMAGE, TensorProto.FLOAT, ["batch", 1, 2, 2])
    outputs = [
        helper.make_tensor_value_info(f"branch_map_{i}", TensorProto.FLOAT, ["batch", 1, 2, 2]) for i in range(2)
    ]
    between = [helper.make_tensor_value_info("tap", TensorProto.FLOAT, shape_between)]
    constants = [
        helper.make_tensor("flat", TensorProto.INT64, [1], [-1]),
        helper.make_tensor("back", TensorProto.INT64, [4], [-1, 1, 2, 2]),
    ]
    graph = helper.make_graph(
        [helper.make_node(*node) for node in nodes], "g", [image], outputs, constants, value_info=between
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_what_does_not_hold_images_is_computed_anew():
    folded = [
        ("Reshape", [IMAGE, "flat"], ["tap"]),  # all images' pixels in one row
        ("Reshape", ["tap", "back"], ["branch_map_0"]),
        ("Exp", ["tap"], ["grown"]),
        ("Reshape", ["grown", "back"], ["branch_map_1"]),
    ]
    model = two_stages([None], folded)
    segments = cut(model, 2)
    assert segments[1].inputs == (IMAGE,)
    images = np.linspace(-1, 2, 12, dtype=np.float32).reshape(3, 1, 2, 2)
    np.testing.assert_allclose(run_pieces(segments, images)["branch_map_1"], np.exp(images), rtol=1e-6)


def test_an_output_without_images_cannot_be_cut():
    model = two_stages(["batch", 1, 2, 2], [("Neg", [IMAGE], ["branch_map_0"]), ("Exp", [IMAGE], ["branch_map_1"])])
    model.graph.output[1].type.tensor_type.shape.dim[0].dim_value = 1
    with pytest.raises(CutError, match="`branch_map_1` is not one image after another"):
        cut(model, 2)


def test_a_stage_that_hangs_on_a_deeper_one_cannot_be_cut():
    upside_down = [
        ("Exp", [IMAGE], ["tap"]),
        ("Neg", ["tap"], ["branch_map_1"]),
        ("Abs", ["branch_map_1"], ["branch_map_0"]),
    ]
    with pytest.raises(CutError, match="`branch_map_1` is made on the way"):
        cut(two_stages(["batch", 1, 2, 2], upside_down), 2)


def test_dequantised_numbers_cross_as_they_were_quantised():
    scale = helper.make_tensor("scale", TensorProto.FLOAT, [], [0.1])
    zero = helper.make_tensor("zero", TensorProto.UINT8, [], [3])
    nodes = [
        ("Exp", [IMAGE], ["grown"]),
        ("QuantizeLinear", ["grown", "scale", "zero"], ["small"]),
        ("DequantizeLinear", ["small", "scale", "zero"], ["tap"]),
        ("Neg", ["tap"], ["branch_map_0"]),
        ("Abs", ["tap"], ["branch_map_1"]),
    ]
    model = two_stages(["batch", 1, 2, 2], nodes)
    model.graph.initializer.extend([scale, zero])
    first, second = cut(model, 2)
    assert (second.inputs, sorted(first.outputs)) == (("small",), ["branch_map_0", "small"])
    images = np.linspace(-1, 2, 12, dtype=np.float32).reshape(3, 1, 2, 2)
    (expected,) = session(model.SerializeToString()).run(["branch_map_1"], {IMAGE: images})
    np.testing.assert_array_equal(run_pieces([first, second], images)["branch_map_1"], expected)
