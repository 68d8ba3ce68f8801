"""What crosses from training to serving: tensor names of the ONNX graph, and the model card. No torch here."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

FORMAT_VERSION: Literal[1] = 1
METADATA_KEY = "interflow"
"""Key of the ONNX metadata entry that holds the card's JSON."""

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""Of a model, which is also its folder's name."""
VERSION_PATTERN = r"^[1-9][0-9]*$"
"""Of a version, which is also its folder's name; the highest number is the newest."""

MODEL_FILE = "model.onnx"
CARD_FILE = "model.json"

IMAGE = "image"
LOGITS = "logits"
BRANCH_LOGITS = "branch_logits"
BRANCH_WEIGHTS = "branch_weights"
LAYER_ATTENTION = "layer_attention"


def branch_map_name(branch: int) -> str:
    """Name of the output that holds the class maps of a branch, counted from 0."""
    return f"branch_map_{branch}"


class InterflowError(Exception):
    """Something given to us that we refuse: the message says what it was, what was expected and what to do.

    Entry points print the message as one sentence and exit with 1; the server answers it as problem+json.
    """


class CardError(InterflowError):
    """A model card that cannot be read, or that does not describe its graph."""


class TensorSpec(NamedTuple):
    """Type and shape of a graph's input or output; `None` is the symbolic batch."""

    dtype: str
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join('N' if size is None else str(size) for size in self.shape)}]"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Matrix = tuple[tuple[float, ...], ...]


class InputSpec(_Part):
    """The network's input, and the rule that brings any image to it (`model/images.py`)."""

    height: Positive
    width: Positive
    channels: Literal[1, 3]
    """1 grey, 3 RGB."""
    mean: tuple[float, ...]
    """Per channel, of pixels scaled to 0..1; applied inside the graph, as is `std`."""
    std: tuple[Annotated[float, Field(gt=0)], ...]
    resize: Literal["crop", "pad", "squash"]
    """What happens to an image of other proportions."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"

    @model_validator(mode="after")
    def _one_statistic_a_channel(self) -> Self:
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(
                f"mean and std need {self.channels} values, one per channel; got {len(self.mean)} and {len(self.std)}"
            )
        return self


class BackboneInfo(_Part):
    """Which network the stages belong to: all that `create_model` needs to build it again."""

    name: str
    """In the registry."""
    depth: Positive
    """Layers kept."""
    width: Annotated[float, Field(gt=0)]
    """Multiplier of the layers' channels."""
    neck: Literal["aff", "iaff"] | None = None
    """Fuses each stage's map with the deeper ones before its branch."""
    options: dict[str, Any] = {}
    """Of this backbone alone, as they were given."""


class MethodInfo(_Part):
    """How the branches were fused (Interflow, Table II)."""

    name: str
    """Normal, or S0 to S9."""
    attention: Literal["none", "hard", "branch", "class"]
    """One branch alone, weights fixed by hand, one learned weight per branch, or one per branch and class."""
    initial_weights: tuple[float, ...] | Literal["random"]
    learned: bool
    """Whether training moved the weights."""
    shared_heads: bool
    """Branches of equal channels share one linear layer."""
    weighed_anew: bool = False
    """Whether the weights of each stage then got a factor, fitted on held-out images."""


class StageInfo(_Part):
    """A span of the backbone that ends in a tapped feature map."""

    name: str
    depth: Positive
    """Layers of the backbone up to the tap."""
    channels: Positive
    """Of the tapped feature map."""
    map_size: tuple[Positive, Positive]
    """Height and width of the class maps at the card's input size."""
    work: Fraction | None = None
    """Share of the backbone's work done up to the tap, 1 for the last stage: the mean of the shares of multiplications
    and of weights read. None: not counted."""


class LayerAttentionInfo(_Part):
    """One row of the output `layer_attention`: which sources a block of the backbone drew on."""

    block: str
    """Where in the network."""
    module: str
    """AFI, MRLA-base, MRLA-light, AFF or iAFF."""
    kind: Literal["share", "gate"]
    """Shares sum to 1 over the sources; a gate is a number in 0..1 by itself."""
    sources: Annotated[tuple[str, ...], Field(min_length=1)]
    """Blocks, stages or inputs, in the row's order; the row's further values are zero."""


class DoubtInfo(_Part):
    """How likely an answer is wrong: logistic in two reasons (`model.explain.reasons_to_doubt`).

    Fitted on held-out data; the last two measured on test.
    """

    coefficients: tuple[float, float, float]
    """Log-odds: the first, plus the second times log(1 - confidence), plus the third times log(stages' indecision)."""
    threshold: Fraction
    """One in ten held-out answers has more doubt than this."""
    share: Fraction
    """Of the test answers, with more doubt than the threshold."""
    share_of_wrong: Fraction
    """Of the wrong test answers, with more doubt than the threshold."""


class ExitPolicy(_Part):
    """When an image needs no deeper stage, and what stopping there loses and saves on average.

    An image stops at the first stage whose reading is as confident as that stage's threshold; its answer is that
    reading. Fitted on held-out data, measured on test.
    """

    max_loss: Fraction
    """Of accuracy against full depth: the promise that the thresholds were fitted to."""
    thresholds: tuple[Fraction | None, ...]
    """Confidence of the reading, for each stage but the last; None: no image stops there."""
    accuracy: Fraction
    """On test; that of full depth is `metrics.accuracy`."""
    work: Fraction
    """Mean on test of the share of the backbone's work (`StageInfo.work`) that is done."""
    stops: tuple[Fraction, ...]
    """Share of the test images that each stage answers; the last stage's had the full answer."""


class Metrics(_Part):
    """Measured once, on data that nothing was trained, fitted or chosen on. Fractions, not percent.

    The four figures by class come together; cards from before there were any hold `None`: not measured.
    """

    data: str
    split: str
    images: Positive
    seed: int
    """Of the training run."""
    accuracy: Fraction
    """Of the fused answer."""
    macro_f1: Fraction | None = None
    """Mean over the classes of the fused answer's F1: rare classes count as much as common ones."""
    auroc: Fraction | None = None
    """Mean over the classes of the area under the ROC curve of their fused confidence, each against the rest; with two
    classes that of either. 0.5 is chance."""
    class_recall: tuple[Fraction, ...] | None = None
    """Share of each class's images whose fused answer is right, by index; its mean is the balanced accuracy."""
    class_images: tuple[Positive, ...] | None = None
    """Images of each class, by index: how much a recall is worth."""
    branch_accuracy: tuple[Fraction, ...]
    """Of each stage's reading."""
    ece: Fraction
    """Expected calibration error of the fused confidence, 15 bins of equal width."""
    branch_ece: tuple[Fraction, ...]
    """Of each stage's reading."""
    ece_adaptive: Fraction | None = None
    """As `ece`, 15 bins of equally many images."""
    nll: Annotated[float, Field(ge=0)] | None = None
    """Mean negative log-likelihood of the labels under the fused confidences, in nats."""
    branch_nll: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    """Of each stage's reading."""

    @model_validator(mode="after")
    def _figures_by_class_together(self) -> Self:
        figures = (self.macro_f1, self.auroc, self.class_recall, self.class_images)
        if None in figures and figures != (None,) * 4:
            raise ValueError("macro_f1, auroc, class_recall and class_images come together, or not at all")
        return self


class AgainstFloat32(_Part):
    """What fewer bits changed: the float32 network's figures on the test images of `metrics`, and agreement with it."""

    accuracy: Fraction
    """Of the fused answer in float32."""
    branch_accuracy: tuple[Fraction, ...]
    """Of each stage's reading in float32."""
    agreement: Fraction
    """Share of images whose fused answer is the one in float32."""
    branch_agreement: tuple[Fraction, ...]
    """Share of images whose reading is the one in float32, for each stage."""
    residual: Annotated[float, Field(ge=0)]
    """Largest difference over the images of fused logits from the sums of contributions, or of branch logits from the
    means of their class maps; relative to the largest magnitude of these, or 1."""
    calibrated_on: Positive | None = None
    """Held-out images that the ranges of int8 are those of."""
    cpu: tuple[str, ...]
    """Architecture and extensions of the CPU that this was measured on; one without them may answer otherwise."""


class Provenance(_Part):
    """Where the weights come from."""

    created: AwareDatetime
    """When the card was written; the server's default is the model with the newest."""
    run: str
    """Name of the training run's folder."""
    init: str | None = None
    """What the backbone's weights started from: "pretrained" (the library's), or a file's name; None: random ones."""
    weights_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of the network's tensors in safetensors form."""
    git_revision: str | None
    """Of the training code; "-dirty" where it had uncommitted changes."""
    versions: dict[str, str]
    """Of the libraries that trained and exported it."""


class ModelCard(_Part):
    """All that a reader of an artefact must know; `model.json`, and the same text in the ONNX metadata.

    B branches from shallow to deep, K classes; matrices are B rows of K values.
    """

    format_version: Literal[1] = FORMAT_VERSION
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    version: Annotated[str, Field(pattern=VERSION_PATTERN)]
    precision: Literal["float32", "float16", "int8"] = "float32"
    """Of the graph's numbers; normalisation, class maps, pooling and fusion are always float32."""
    classes: Annotated[tuple[str, ...], Field(min_length=2)]
    """Labels, by index."""
    input: InputSpec
    backbone: BackboneInfo
    method: MethodInfo
    stages: Annotated[tuple[StageInfo, ...], Field(min_length=1)]
    """From shallow to deep."""
    layer_attention: tuple[LayerAttentionInfo, ...] = ()
    """The rows of that output, in the network's order; empty where its layers have no attention of their own."""
    branch_weights: Matrix
    """W: the fused logit of class c is the sum over stages of W[i][c] * z[i][c]."""
    reading_scales: Matrix
    """a: what stage i believes is softmax(a[i] * z[i])."""
    temperature: Annotated[float, Field(gt=0)]
    """Fused confidence is the softmax of -((highest logit - logit) / temperature) ** power."""
    power: Annotated[float, Field(gt=0)] = 1.0
    """1, as in cards from before it: the confidence is softmax(logits / temperature)."""
    branch_importance: tuple[Fraction, ...]
    """Mean share of each stage in the answers."""
    doubt: DoubtInfo | None = None
    """None: not fitted, as where hardly a held-out answer is wrong."""
    exits: tuple[ExitPolicy, ...] = ()
    """By rising `max_loss`; empty where no image can stop early: one stage, or a graph that cannot be cut."""
    fitted_on: str
    """The data that reading scales, temperature, power and importance were fitted on."""
    metrics: Metrics
    against_float32: AgainstFloat32 | None = None
    """None where `precision` is float32 itself."""
    provenance: Provenance

    @model_validator(mode="after")
    def _shapes_agree(self) -> Self:
        branches, classes = len(self.stages), len(self.classes)
        for field in ("branch_weights", "reading_scales"):
            rows: Matrix = getattr(self, field)
            if [len(row) for row in rows] != [classes] * branches:
                raise ValueError(f"{field} needs {branches} rows (stages) of {classes} values (classes)")
        for field, values in (
            ("branch_importance", self.branch_importance),
            ("metrics.branch_accuracy", self.metrics.branch_accuracy),
            ("metrics.branch_ece", self.metrics.branch_ece),
        ):
            if len(values) != branches:
                raise ValueError(f"{field} needs {branches} values, one per stage; got {len(values)}")
        for policy in self.exits:
            if (len(policy.thresholds), len(policy.stops)) != (branches - 1, branches):
                raise ValueError(f"exits need {branches - 1} thresholds and {branches} stops, one per stage")
        if [policy.max_loss for policy in self.exits] != sorted({policy.max_loss for policy in self.exits}):
            raise ValueError("exits must come by rising max_loss")
        for field, by_class in (
            ("metrics.class_recall", self.metrics.class_recall),
            ("metrics.class_images", self.metrics.class_images),
        ):
            if by_class is not None and len(by_class) != classes:
                raise ValueError(f"{field} needs {classes} values, one per class; got {len(by_class)}")
        if self.metrics.class_images is not None and sum(self.metrics.class_images) != self.metrics.images:
            raise ValueError(
                f"metrics.class_images must sum to metrics.images, {self.metrics.images}; "
                f"they sum to {sum(self.metrics.class_images)}"
            )
        if not math.isclose(sum(self.branch_importance), 1, abs_tol=1e-3):
            raise ValueError(f"branch_importance must sum to 1; it sums to {sum(self.branch_importance):.4f}")
        if len(set(self.classes)) != classes:
            raise ValueError("classes must be distinct")
        return self

    @model_validator(mode="after")
    def _fewer_bits_are_compared(self) -> Self:
        against, branches = self.against_float32, len(self.stages)
        if (against is None) != (self.precision == "float32"):
            raise ValueError("against_float32 comes with every precision but float32")
        if against and not len(against.branch_accuracy) == len(against.branch_agreement) == branches:
            raise ValueError(f"against_float32 needs {branches} values a field by branch, one per stage")
        return self

    @property
    def inputs(self) -> dict[str, TensorSpec]:
        """The graph's inputs by name."""
        return {IMAGE: TensorSpec("uint8", (None, self.input.height, self.input.width, self.input.channels))}

    @property
    def outputs(self) -> dict[str, TensorSpec]:
        """The graph's outputs by name, in the graph's order."""
        branches, classes = len(self.stages), len(self.classes)
        specs = {
            LOGITS: TensorSpec("float32", (None, classes)),
            BRANCH_LOGITS: TensorSpec("float32", (None, branches, classes)),
            BRANCH_WEIGHTS: TensorSpec("float32", (None, branches, classes)),
        } | {
            branch_map_name(branch): TensorSpec("float32", (None, classes, *stage.map_size))
            for branch, stage in enumerate(self.stages)
        }
        if self.layer_attention:
            sources = max(len(row.sources) for row in self.layer_attention)
            specs[LAYER_ATTENTION] = TensorSpec("float32", (None, len(self.layer_attention), sources))
        return specs

    def to_json(self) -> str:
        """The card as indented JSON: the text of `model.json` and of the ONNX metadata entry."""
        return self.model_dump_json(indent=2)

    @classmethod
    def from_json(cls, text: str | bytes, source: Path | str) -> Self:
        """Read a card; `source` names it in the error.

        Raises:
            CardError: not JSON, or not a card of this format: the first wrong field is named.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "the card"
            raise CardError(f"{source}: not a model card: {field}: {first['msg']}. Export the model again.") from error
