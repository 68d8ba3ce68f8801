"""Open Inference Protocol v2: what a request's bytes say, and an answer's bytes; tensors as JSON or as binary data.

The protocol is kserve/open-inference-protocol; binary tensors and classification are Triton's extensions of it.
"""

import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import to_json

from app.errors import InferenceError, InferenceRequestError, TooManyBytesError, first_problem
from app.inference import Outputs
from app.schemas import ProtocolModel, ProtocolTensor
from app.settings import Settings
from model.contract import IMAGE, LOGITS, ModelCard, TensorSpec

EXTENSIONS = ("binary_tensor_data", "classification", "model_repository")
PLATFORM = "onnxruntime_onnx"
DATATYPES = {"uint8": "UINT8", "float32": "FP32"}
"""The protocol's names of our types."""


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)  # a number in quotes is none; what we do not know is ignored


Size = Annotated[int, Field(ge=0, lt=2**63)]
"""The protocol's integers; JSON's may have thousands of digits."""


class InputParameters(_Part):
    """Parameters of an input."""

    binary_data_size: Annotated[
        Size | None, Field(description="bytes of the tensor after the JSON, in the place of `data`")
    ] = None
    shared_memory_region: Annotated[str | None, Field(description="refused")] = None


class InputTensor(_Part):
    """One input: values in `data`, flat or nested, or else after the JSON."""

    name: str
    shape: list[Size]
    datatype: str
    parameters: InputParameters = InputParameters()
    data: list[Any] | None = None


class OutputParameters(_Part):
    """Parameters of an output."""

    binary_data: bool | None = None
    classification: Annotated[
        int, Field(ge=0, description="give the k best classes as `value:index:label`; 0: the numbers themselves")
    ] = 0
    shared_memory_region: Annotated[str | None, Field(description="refused")] = None


class RequestedOutput(_Part):
    """One output that is asked for."""

    name: str
    parameters: OutputParameters = OutputParameters()


class RequestParameters(_Part):
    """Parameters of a request."""

    binary_data_output: Annotated[bool, Field(description="outputs as binary data, where they do not say")] = False
    timeout: Annotated[int | None, Field(ge=0, le=10**12, description="microseconds; 0: as the server is set")] = None


class InferRequest(_Part):
    """An inference request's JSON."""

    id: str | None = None
    parameters: RequestParameters = RequestParameters()
    inputs: list[InputTensor]
    outputs: Annotated[list[RequestedOutput], Field(max_length=100, description="none: all")] = []


class Wanted(NamedTuple):
    """One output of an answer."""

    name: str
    binary: bool
    classification: int
    """The k best classes instead of numbers; 0: numbers."""


class Ask(NamedTuple):
    """An inference request, held against the model that it is for."""

    id: str | None
    images: np.ndarray
    """uint8 (N, H, W, C); of binary data, a view of the request's bytes."""
    outputs: Sequence[Wanted]
    timeout_s: float | None

    @property
    def names(self) -> list[str]:
        """Outputs that the network must give."""
        return list(dict.fromkeys(output.name for output in self.outputs))


def describe_model(card: ModelCard, versions: Sequence[str]) -> ProtocolModel:
    """The protocol's metadata of a model, of which these versions are loaded."""
    return ProtocolModel(
        name=card.name,
        versions=list(versions),
        platform=PLATFORM,
        inputs=_describe(card.inputs),
        outputs=_describe(card.outputs),
    )


def _describe(specs: Mapping[str, TensorSpec]) -> list[ProtocolTensor]:
    return [
        ProtocolTensor(
            name=name, datatype=DATATYPES[spec.dtype], shape=[-1 if size is None else size for size in spec.shape]
        )
        for name, spec in specs.items()
    ]


def inflate(body: bytes, limit: int) -> bytes:
    """Undo the content codings gzip and deflate (zlib), as far as the limit.

    Raises:
        InferenceRequestError: damaged, or followed by something else.
        TooManyBytesError: there is more.
    """
    inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)  # 32: tells gzip from zlib by itself
    try:
        inflated = inflater.decompress(body, limit + 1)
    except zlib.error as error:
        raise InferenceRequestError(f"the body is not what its Content-Encoding says ({error}).") from error
    if len(inflated) > limit:
        raise TooManyBytesError(
            f"the body inflates to more than {limit} bytes, the limit. Send fewer images, or raise "
            "INTERFLOW_MAX_TENSOR_BYTES."
        )
    if not inflater.eof or inflater.unused_data:
        raise InferenceRequestError("the compressed body ends early, or goes on after its end.")
    return inflated


def read_request(body: bytes, json_bytes: int, card: ModelCard, settings: Settings) -> Ask:
    """Read an inference request.

    Args:
        body: JSON, and after it the binary data.
        json_bytes: length of the JSON.
        card: of the model that is asked.
        settings: limits.

    Raises:
        InferenceRequestError: what breaks the protocol, or does not fit the model.
        TooManyBytesError: too much JSON, or an answer that would be too big.
    """
    if json_bytes > settings.max_json_bytes:
        raise TooManyBytesError(
            f"the JSON has {json_bytes} bytes; the limit is {settings.max_json_bytes} (INTERFLOW_MAX_JSON_BYTES). Send "
            "the tensor as binary data."
        )
    try:
        request = InferRequest.model_validate_json(body[:json_bytes])
    except ValidationError as error:
        raise InferenceRequestError(f"the JSON is no inference request{first_problem(error)}.") from error
    images = _read_images(request.inputs, memoryview(body)[json_bytes:], card.inputs[IMAGE])
    outputs = _read_outputs(request, card)
    _limit_answer(outputs, len(images), card, settings)
    timeout = request.parameters.timeout
    return Ask(request.id, images, outputs, timeout / 1e6 if timeout else None)


def _read_images(inputs: Sequence[InputTensor], binary: memoryview, spec: TensorSpec) -> np.ndarray:
    names = [tensor.name for tensor in inputs]
    if names != [IMAGE]:
        raise InferenceRequestError(
            f"the inputs are {', '.join(map(repr, names))[:200] or 'none'}; expected one, {IMAGE!r}."
        )
    (tensor,) = inputs
    datatype, shape = DATATYPES[spec.dtype], tuple(tensor.shape)
    if tensor.datatype != datatype:
        raise InferenceRequestError(f"input {IMAGE!r} is {tensor.datatype[:50]!r}; expected {datatype!r}.")
    if len(shape) != len(spec.shape) or shape[1:] != spec.shape[1:] or not shape[0]:
        raise InferenceRequestError(
            f"input {IMAGE!r} has the shape {str(list(shape))[:100]}; expected {list(spec.shape[1:])} behind the "
            "number of images, which is at least 1."
        )
    if tensor.parameters.shared_memory_region is not None:
        raise InferenceRequestError("shared memory is not supported. Send the tensor with the request.")
    size = tensor.parameters.binary_data_size
    if (size is None) == (tensor.data is None):
        raise InferenceRequestError(f"input {IMAGE!r} needs either `data` or `binary_data_size`, and not both.")
    if len(binary) != (size or 0):
        raise InferenceRequestError(
            f"{len(binary)} bytes follow the JSON, but `binary_data_size` says {size or 0}. The header "
            "Inference-Header-Content-Length gives the length of the JSON."
        )
    values = np.frombuffer(binary, np.uint8) if tensor.data is None else _read_values(tensor.data)
    if values.size != math.prod(shape):
        raise InferenceRequestError(
            f"input {IMAGE!r} holds {values.size} values; its shape {list(shape)} has {math.prod(shape)}."
        )
    return values.reshape(shape)


def _read_values(data: list[Any]) -> np.ndarray:
    """JSON's lists, flat or nested, as uint8."""
    try:
        values = np.asarray(data)
    except (ValueError, OverflowError):  # ragged, too deep, or not numbers
        values = np.empty(0, object)
    # numpy takes what is too big for an integer as a float, and a list of true and 1 as integers, which does no harm
    if values.size and (values.dtype.kind not in "iu" or values.min() < 0 or values.max() > 255):
        values = np.empty(0, object)
    if not values.size:
        raise InferenceRequestError(f"`data` of input {IMAGE!r} must be lists of whole numbers from 0 to 255.")
    return values.astype(np.uint8)


def _read_outputs(request: InferRequest, card: ModelCard) -> list[Wanted]:
    wanted = []
    for output in request.outputs or [RequestedOutput(name=name) for name in card.outputs]:
        given = output.parameters
        if output.name not in card.outputs:
            raise InferenceRequestError(
                f"{output.name[:100]!r} is not an output of the model; there are {', '.join(card.outputs)}."
            )
        if given.shared_memory_region is not None:
            raise InferenceRequestError("shared memory is not supported. Outputs come with the answer.")
        if given.classification and output.name != LOGITS:
            raise InferenceRequestError(
                f"`classification` is for {LOGITS!r}, not for {output.name!r}: only the fused logits rank the classes."
            )
        binary = request.parameters.binary_data_output if given.binary_data is None else given.binary_data
        wanted.append(Wanted(output.name, binary, given.classification))
    return wanted


def _limit_answer(outputs: Sequence[Wanted], images: int, card: ModelCard, settings: Settings) -> None:
    """Refuse what would fill the memory, before anything is computed."""
    for limit, variable, counted in (
        (settings.max_tensor_bytes, "INTERFLOW_MAX_TENSOR_BYTES", outputs),
        (
            settings.max_json_bytes,
            "INTERFLOW_MAX_JSON_BYTES",
            [output for output in outputs if output.classification or not output.binary],  # classes are texts
        ),
    ):
        size = sum(_tensor_bytes(output, card, images) for output in counted)
        if size > limit:
            raise TooManyBytesError(
                f"the answer's {'tensors' if counted is outputs else 'tensors in JSON'} would have {size} bytes; the "
                f"limit is {limit} ({variable}). Name fewer `outputs`, take them as binary data, or send fewer images."
            )


def _tensor_bytes(output: Wanted, card: ModelCard, images: int) -> int:
    spec = card.outputs[output.name]
    values = math.prod(images if size is None else size for size in spec.shape)
    if output.classification:
        values = images * min(output.classification, len(card.classes))
    return np.dtype(spec.dtype).itemsize * values


def write_answer(card: ModelCard, ask: Ask, outputs: Outputs) -> tuple[bytes, int]:
    """The answer's body, and the length of the JSON at its start; binary data follow, if any were asked for.

    Raises:
        InferenceError: an output is not finite, which JSON could not say.
    """
    described: list[dict[str, Any]] = []
    binary: list[bytes | memoryview] = []
    for wanted in ask.outputs:
        values = np.ascontiguousarray(outputs[wanted.name])
        if not np.isfinite(values).all():
            raise InferenceError("the network gave numbers that are not finite for these images.")
        if wanted.classification:
            ranked = _rank(values, wanted.classification, card.classes)
            datatype, shape = "BYTES", [len(values), len(ranked) // len(values)]
        else:
            datatype, shape = DATATYPES[str(values.dtype)], list(values.shape)
        tensor: dict[str, Any] = {"name": wanted.name, "datatype": datatype, "shape": shape}
        if wanted.binary:
            data = _length_prefixed(ranked) if wanted.classification else values.data.cast("B")
            tensor["parameters"] = {"binary_data_size": len(data)}
            binary.append(data)
        else:
            tensor["data"] = ranked if wanted.classification else values.ravel().tolist()
        described.append(tensor)
    answer: dict[str, Any] = {"model_name": card.name, "model_version": card.version, "outputs": described}
    if ask.id is not None:
        answer["id"] = ask.id
    text = to_json(answer)
    return b"".join([text, *binary]), len(text)


def _rank(logits: np.ndarray, count: int, classes: Sequence[str]) -> list[str]:
    """The best classes of each image, one image after the other, as Triton writes them: value with 6 decimals."""
    best = np.argsort(-logits, axis=1, kind="stable")[:, :count]
    return [
        f"{image[index]:f}:{index}:{classes[index]}"
        for image, indices in zip(logits, best, strict=True)
        for index in indices
    ]


def _length_prefixed(texts: Sequence[str]) -> bytes:
    encoded = [text.encode() for text in texts]
    return b"".join(struct.pack("<I", len(text)) + text for text in encoded)
