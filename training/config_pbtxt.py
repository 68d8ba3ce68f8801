"""The model repository's `config.pbtxt`, for users who point Triton Inference Server at the same folder."""

from model.contract import MODEL_FILE, ModelCard, TensorSpec

MAX_BATCH = 256
"""Images of one request."""
PREFERRED_BATCHES = [8, 32]
"""Images that Triton puts together of requests that wait: a CPU gains nothing by more than the first, a GPU little by
more than the second. It waits for no company: batches grow with the load by themselves, and waiting would cost the
first who came."""
INSTANCES = 2
"""Of each GPU, or of the CPU: while one hands its answers over, the other runs."""
MAX_QUEUE = 512
TIMEOUT_US = 30_000_000
"""As the defaults of INTERFLOW_MAX_QUEUE and INTERFLOW_TIMEOUT_MS."""
_TYPES = {"uint8": "TYPE_UINT8", "float16": "TYPE_FP16", "float32": "TYPE_FP32"}


def config_pbtxt(card: ModelCard) -> str:
    """Triton's configuration of a model, in protobuf text form; dimensions without the batch, as Triton wants them.

    KIND_AUTO puts the instances on every GPU, or on the CPU where there is none; KIND_GPU would not load there.
    """
    tensors = _tensors("input", card.inputs) + _tensors("output", card.outputs)
    return (
        f'name: "{card.name}"\n'
        f'backend: "onnxruntime"\n'
        f'default_model_filename: "{MODEL_FILE}"\n'
        "version_policy { latest { num_versions: 1 } }\n"
        f"max_batch_size: {MAX_BATCH}\n{tensors}"
        "dynamic_batching {\n"
        f"  preferred_batch_size: {PREFERRED_BATCHES}\n"
        "  max_queue_delay_microseconds: 0\n"
        "  default_queue_policy {\n"
        f"    timeout_action: REJECT default_timeout_microseconds: {TIMEOUT_US} max_queue_size: {MAX_QUEUE}\n"
        "  }\n"
        "}\n"
        f"instance_group {{ kind: KIND_AUTO count: {INSTANCES} }}\n"
    )


def _tensors(kind: str, tensors: dict[str, TensorSpec]) -> str:
    return "".join(
        f'{kind} {{ name: "{name}" data_type: {_TYPES[spec.dtype]} dims: {list(spec.shape[1:])} }}\n'
        for name, spec in tensors.items()
    )
