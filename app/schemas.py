"""What the server answers, as JSON."""

from typing import (
    Annotated,
    Literal,
    NotRequired,  # pydantic asks for these below Python 3.12
)

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from model.contract import MethodInfo, ModelCard

Confidence = Annotated[float, Field(ge=0, le=1)]


class _Body(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)


class Problem(_Body):
    """An error (RFC 9457); `code` is stable and meant for programs, `detail` for people."""

    type: Literal["about:blank"] = "about:blank"
    title: str
    status: int
    detail: str
    code: str
    request_id: str


class ModelRef(_Body):
    """Which network answered; `sha256` is that of its weights."""

    name: str
    version: str
    method: str
    sha256: str


# An answer is a plain dictionary, which costs its request a fraction of what a model's objects would.


class Prediction(TypedDict):
    """A class and the softmax probability given to it."""

    label: str
    index: Annotated[int, Field(ge=0)]
    confidence: Confidence


class StageAnswer(TypedDict):
    """What one stage said, and how much it counted in the fused answer."""

    name: str
    depth: Annotated[int, Field(description="layers of the backbone up to this stage's end")]
    prediction: Annotated[
        Prediction | None, Field(description="of the stage's reading, softmax(a * z): what it believes")
    ]
    top_k: Annotated[list[Prediction], Field(description="of the stage's reading")]
    weight: Annotated[
        float | None, Field(description="attention weight w for the answer's class; no measure of importance")
    ]
    contribution: Annotated[
        float | None, Field(description="w * z for the answer's class; over all stages they sum to its fused logit")
    ]
    share: Annotated[
        Annotated[float, Field(ge=0, le=1)] | None,
        Field(
            description="of the answer: its absolute evidence over that of all stages; null if not all were evaluated"
        ),
    ]
    agrees: Annotated[bool | None, Field(description="the reading's class is the answer's")]
    evaluated: Annotated[
        bool, Field(description="false only with `mode=adaptive`, behind the stage that answered: all else is null")
    ]


class LayerSource(TypedDict):
    """One thing that a block drew on: an earlier block, a stage, an input or itself."""

    name: str
    weight: Annotated[
        float, Field(description="0..1 up to rounding; averaged over channels or heads, and over positions")
    ]


class LayerAttention(TypedDict):
    """What one block of the network drew on for this image, by the attention that its own layers have."""

    block: Annotated[str, Field(description="where in the network")]
    module: Annotated[str, Field(description="AFI, MRLA-base, MRLA-light, AFF or iAFF")]
    kind: Annotated[
        Literal["share", "gate"],
        Field(
            description="share: the weights sum to 1 over the sources; gate (MRLA-light): each is a number in 0..1 by "
            "itself, and they do not sum to 1"
        ),
    ]
    sources: list[LayerSource]


class SeenBox(TypedDict):
    """What of the upright image the network saw, as fractions of its width and height.

    All of it is 0, 0, 1, 1; where the input was padded, it reaches beyond.
    """

    left: float
    top: float
    right: float
    bottom: float


class StageMaps(TypedDict):
    """Where in the image one stage's contributions come from."""

    name: str
    shape: Annotated[list[int], Field(min_length=3, max_length=3, description="planes, height and width")]
    values: Annotated[
        str,
        Field(
            description="base64 of little-endian float32, planes first and rows last. One plane for each of `classes`, "
            "which sums to the stage's contribution to that class's fused logit; then their mean over all classes of "
            "the model: the evidence of a class is its plane less that one"
        ),
    ]


class Maps(TypedDict):
    """The fused logits as sums over stages and positions: exact on the grid of each stage, whose cells are no pixels
    (a deep cell saw much of the image)."""

    box: Annotated[SeenBox, Field(description="where in the upright image all grids lie")]
    classes: Annotated[
        list[int],
        Field(
            description="indices, ascending: all classes where there are at most 32, else those listed in `top_k` of "
            "the answer and of its stages"
        ),
    ]
    stages: Annotated[list[StageMaps], Field(description="from shallow to deep")]


class Timing(TypedDict):
    """Milliseconds since the request's body was read."""

    decode: Annotated[float, Field(description="image to pixels, with the wait for a free decoder")]
    queue: Annotated[float, Field(description="wait for the network")]
    inference: Annotated[float, Field(description="the network's forward pass, of the whole batch that ran")]
    total: Annotated[float, Field(description="from the body's last byte to this answer")]


class Exit(TypedDict):
    """The stage that an adaptive answer stopped at: the answer is its reading."""

    stage: str
    depth: Annotated[int, Field(description="layers of the backbone up to this stage's end")]


class Interpretation(TypedDict):
    """The part of an answer that the network decides."""

    prediction: Annotated[
        Prediction,
        Field(description="of the fused logits over the card's temperature; of an `exit`, that stage's reading"),
    ]
    top_k: list[Prediction]
    stages: Annotated[list[StageAnswer], Field(description="from shallow to deep")]
    agreement: Annotated[float, Field(ge=0, le=1, description="share of the evaluated stages that agree")]
    doubt: NotRequired[
        Annotated[
            Confidence | None,
            Field(
                description="probability that the answer is wrong, by its confidence and by how undecided the stages "
                "are; `doubt` of the card (`GET /model`) has a threshold. Null where the image stopped early"
            ),
        ]
    ]
    exit: NotRequired[
        Annotated[
            Exit | None,
            Field(description="only with `mode=adaptive`: where the image stopped; null if all stages were evaluated"),
        ]
    ]
    layer_attention: NotRequired[
        Annotated[
            list[LayerAttention],
            Field(description="only where `layers=true` asked for it: what the blocks drew on, in the network's order"),
        ]
    ]
    maps: NotRequired[Annotated[Maps, Field(description="only where `explain=maps` asked for them")]]


class Answer(Interpretation):
    """The answer to one image."""

    request_id: str
    model: ModelRef
    timing_ms: Timing


class BatchAnswer(TypedDict):
    """The answers to several images."""

    results: Annotated[
        list[Answer | Problem], Field(description="in the order of the images; a problem where one has none")
    ]


class CudaRuntime(_Body):
    """How a model runs on a GPU."""

    tf32: Annotated[bool, Field(description="float32 convolutions multiply with ten bits of each factor")]
    graphs: Annotated[list[int], Field(description="of the sizes of batches, those that run as a CUDA graph")]
    memory: Annotated[
        int | None, Field(description="bytes that onnxruntime may allocate for this model, in this process; null: any")
    ]


class Runtime(_Body):
    """What a model runs on."""

    provider: Literal["cuda", "cpu"]
    requested_provider: Literal["auto", "cuda", "cpu"]
    fallback: Annotated[str | None, Field(description="why `auto` did not take CUDA; null where it did")]
    onnxruntime: Annotated[str, Field(description="version")]
    cpus: Annotated[int, Field(description="that this process may use, by affinity and control group")]
    lanes: Annotated[int, Field(description="inferences at a time")]
    helpers: Annotated[int, Field(description="more of them, where full batches wait")]
    threads: Annotated[int, Field(description="CPU threads of an inference; the lanes share all but their own")]
    lone_threads: Annotated[int, Field(description="CPU threads of an inference that has all CPUs for itself")]
    pinned: Annotated[bool, Field(description="lone threads stay on CPUs of their own, but for the lane's")]
    niceness: Annotated[int, Field(description="of these threads; 19 lets all others go first")]
    spinning: Annotated[bool, Field(description="idle threads of an inference burn their CPU")]
    max_batch: Annotated[int, Field(description="images that are run at a time, where so many wait")]
    small_batch: Annotated[int, Field(description="images that are run at a time, where fewer wait")]
    batch_sizes: Annotated[
        list[int] | None, Field(description="sizes that batches are padded to, all warmed up; null: none")
    ]
    batch_wait_us: Annotated[int, Field(description="microseconds that images wait for others to fill their batch")]
    max_queue: Annotated[int, Field(description="images that may wait")]
    cuda: Annotated[CudaRuntime | None, Field(description="null on the CPU")] = None


class ModelDescription(ModelCard):
    """A model's card, and what it runs on."""

    runtime: Runtime


class LoadedModelSummary(ModelRef):
    """One loaded model."""

    classes: Annotated[int, Field(description="how many")]
    default: Annotated[bool, Field(description="answers where a request names no model")]


class ModelList(_Body):
    """The loaded models."""

    models: list[LoadedModelSummary]


class StageWeights(_Body):
    """One stage's learned numbers, each by class name; where they are shared, all classes have the same."""

    name: str
    depth: int
    weights: Annotated[dict[str, float], Field(description="W: factor of the stage's raw logit in the fused logit")]
    reading_scales: Annotated[dict[str, float], Field(description="a: the stage's reading is softmax(a * z)")]
    importance: Annotated[Confidence, Field(description="mean share of the stage in the answers")]
    accuracy: Annotated[Confidence, Field(description="of the stage's reading, on the test data that the card names")]


class BranchWeights(_Body):
    """How a model's stages are fused."""

    model: ModelRef
    method: MethodInfo
    shared_over_classes: Annotated[bool, Field(description="one weight per stage (true), or one per stage and class")]
    stages: list[StageWeights]
    fitted_on: Annotated[str, Field(description="data that reading scales and importance were fitted on")]
    how_to_read: str


class Alive(_Body):
    """The process answers."""

    status: Literal["alive"] = "alive"


class ReadyModel(_Body):
    """A model that passed its warm-up."""

    name: str
    version: str
    provider: Literal["cuda", "cpu"]
    fallback: str | None


class Ready(_Body):
    """At least one model is loaded and passed its warm-up."""

    status: Literal["ready"] = "ready"
    models: Annotated[list[ReadyModel], Field(min_length=1)]


class ProtocolProblem(_Body):
    """An error, as the Open Inference Protocol has it."""

    error: str


class ProtocolServer(_Body):
    """This server, as the Open Inference Protocol describes one."""

    name: str
    version: str
    extensions: list[str]


class ProtocolLive(_Body):
    """The process answers."""

    live: Literal[True] = True


class ProtocolReady(_Body):
    """At least one model is loaded and passed its warm-up."""

    ready: Literal[True] = True


class ProtocolModelReady(_Body):
    """The model is loaded and passed its warm-up."""

    name: str
    ready: Literal[True] = True


class ProtocolTensor(_Body):
    """An input or output of a model; -1 is the number of images."""

    name: str
    datatype: str
    shape: list[int]


class ProtocolModel(_Body):
    """A model, as the Open Inference Protocol describes one."""

    name: str
    versions: Annotated[list[str], Field(description="that are loaded")]
    platform: str
    inputs: list[ProtocolTensor]
    outputs: list[ProtocolTensor]


class IndexEntry(_Body):
    """One version of a model, on disk or loaded."""

    name: str
    version: str
    state: Literal["READY", "UNAVAILABLE"]
    reason: Annotated[str, Field(description="why it is not loaded")]
