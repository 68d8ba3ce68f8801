"""The model repository's `config.pbtxt`, for users who point Triton Inference Server at the same folder."""

from model.contract import MODEL_FILE, ModelCard, TensorSpec

MAX_BATCH = 256
_TYPES = {"uint8": "TYPE_UINT8", "float32": "TYPE_FP32"}


def config_pbtxt(card: ModelCard) -> str:
    """Triton's configuration of a model, in protobuf text form; dimensions without the batch, as Triton wants them."""
    tensors = _tensors("input", card.inputs) + _tensors("output", card.outputs)
    return (
        f'name: "{card.name}"\n'
        f'backend: "onnxruntime"\n'
        f'default_model_filename: "{MODEL_FILE}"\n'
        f"max_batch_size: {MAX_BATCH}\n{tensors}dynamic_batching {{ }}\n"
    )


def _tensors(kind: str, tensors: dict[str, TensorSpec]) -> str:
    return "".join(
        f'{kind} {{ name: "{name}" data_type: {_TYPES[spec.dtype]} dims: {list(spec.shape[1:])} }}\n'
        for name, spec in tensors.items()
    )
