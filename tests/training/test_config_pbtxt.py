"""Triton's configuration, by Triton's own schema, and held against the graphs that it describes."""

from pathlib import Path

import onnx
import pytest

from app.settings import Settings
from model.contract import CARD_FILE, IMAGE, LAYER_ATTENTION, MODEL_FILE, LayerAttentionInfo, ModelCard
from training.config_pbtxt import config_pbtxt

EXPORTS = Path(__file__).parents[2] / "exports"
BUNDLED = ["cifar10", "cifar10-int8", "digits"]


def read(text):
    """By the schema that tritonclient carries; an unknown field or value is an error."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    return text_format.Parse(text, model_config_pb2.ModelConfig())


def card_of(name):
    path = EXPORTS / name / "1" / CARD_FILE
    return ModelCard.from_json(path.read_bytes(), path)


def signature(values):
    """Name, ONNX's type and shape without the batch."""
    tensors = [(value.name, value.type.tensor_type) for value in values]
    return {name: (kind.elem_type, [size.dim_value for size in kind.shape.dim[1:]]) for name, kind in tensors}


def told(tensors):
    from tritonclient.grpc import model_config_pb2 as triton

    types = {
        triton.TYPE_UINT8: onnx.TensorProto.UINT8,
        triton.TYPE_FP16: onnx.TensorProto.FLOAT16,
        triton.TYPE_FP32: onnx.TensorProto.FLOAT,
    }
    return {tensor.name: (types[tensor.data_type], list(tensor.dims)) for tensor in tensors}


@pytest.mark.parametrize("name", BUNDLED)
def test_the_bundled_models_have_what_an_export_would_write(name):
    assert (EXPORTS / name / "config.pbtxt").read_text() == config_pbtxt(card_of(name))


@pytest.mark.parametrize("name", BUNDLED)
def test_it_describes_the_graph(name):
    config = read((EXPORTS / name / "config.pbtxt").read_text())
    graph = onnx.load(EXPORTS / name / "1" / MODEL_FILE, load_external_data=False).graph
    assert told(config.input) == signature(graph.input)
    assert told(config.output) == signature(graph.output)
    assert all(value.type.tensor_type.shape.dim[0].dim_param for value in (*graph.input, *graph.output))
    assert (config.name, config.backend, config.default_model_filename) == (name, "onnxruntime", MODEL_FILE)


def test_batches_limits_and_instances():
    from tritonclient.grpc import model_config_pb2 as triton

    config = read(config_pbtxt(card_of("digits")))
    batching = config.dynamic_batching
    assert 1 < min(batching.preferred_batch_size) <= max(batching.preferred_batch_size) <= config.max_batch_size
    policy = batching.default_queue_policy
    assert policy.max_queue_size == Settings.model_fields["max_queue"].default
    assert policy.default_timeout_microseconds == 1000 * Settings.model_fields["timeout_ms"].default
    assert policy.timeout_action == triton.ModelQueuePolicy.REJECT
    assert config.version_policy.latest.num_versions == 1  # as INTERFLOW_VERSIONS: the newest
    (group,) = config.instance_group
    assert group.kind == triton.ModelInstanceGroup.KIND_AUTO  # KIND_GPU does not load without a GPU
    assert not group.gpus


def test_layer_attention_is_an_output_like_the_others():
    card = card_of("digits")
    rows = (
        LayerAttentionInfo(
            block="stage1.block3", module="AFI", kind="share", sources=("stage1.block1", "stage1.block2")
        ),
        LayerAttentionInfo(block="stage2.block1", module="MRLA-light", kind="gate", sources=("stage2.block1",)),
    )
    card = card.model_copy(update={"layer_attention": rows})
    config = read(config_pbtxt(card))
    assert told(config.output)[LAYER_ATTENTION] == (onnx.TensorProto.FLOAT, [2, 2])


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("uint8", onnx.TensorProto.UINT8), ("float16", onnx.TensorProto.FLOAT16), ("float32", onnx.TensorProto.FLOAT)],
)
def test_other_types(monkeypatch, dtype, expected):
    card = card_of("digits")
    inputs = {IMAGE: card.inputs[IMAGE]._replace(dtype=dtype)}
    monkeypatch.setattr(ModelCard, "inputs", property(lambda _: inputs))
    assert told(read(config_pbtxt(card)).input)[IMAGE] == (expected, [32, 32, 1])
