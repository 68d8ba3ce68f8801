"""What the measurements of serving work on: a model, real photographs as JPEGs, and the class that each of them has."""

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

from model.contract import BRANCH_LOGITS, CARD_FILE, IMAGE, LOGITS, MODEL_FILE, InputSpec, InterflowError, ModelCard
from model.images import read_input

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "exports" / "cifar10" / "1"
PHOTOGRAPHS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
"""Of those that scikit-image carries, the ones in colour."""
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class Images:
    """JPEGs of one size, and what the model says of them.

    Attributes:
        name: for tables.
        files: the JPEGs.
        pixels: uint8 (N, H, W, C), as `model.images.read_input` reads them.
        logits: (N, K), fused.
        branch_logits: (N, B, K).
        labels: of the most likely class.
    """

    name: str
    files: list[Path]
    pixels: np.ndarray
    logits: np.ndarray
    branch_logits: np.ndarray
    labels: list[str]


def find_model(given: Path | None, folder: Path) -> Path:
    """Folder of the version that is measured: the given one, or the shipped one, or one with random weights.

    Args:
        given: `<model>/<version>`, or `<model>`, whose newest version is meant.
        folder: where one with random weights is made.

    Raises:
        InterflowError: there is no artefact where one was said to be.
    """
    if given is None:
        return SHIPPED if SHIPPED.is_dir() else make_model(folder)
    if (given / MODEL_FILE).is_file():
        return given.resolve()
    versions = [path.parent for path in given.glob(f"[1-9]*/{MODEL_FILE}") if path.parent.name.isdecimal()]
    if not versions:
        raise InterflowError(f"--model {given}: expected a folder that holds {MODEL_FILE}, or versions that do.")
    return max(versions, key=lambda path: int(path.name)).resolve()


def make_model(exports: Path) -> Path:
    """A half-width VGG-16 S3 of random weights for 32x32 images in colour: 3.7 million parameters.

    Its batch norms have seen photographs, or the numbers would grow without bound.
    """
    import torch  # noqa: PLC0415 - most runs measure a model that is there

    from model.interflow import Normalize  # noqa: PLC0415
    from model.registry import create_model  # noqa: PLC0415
    from training.artefact import to_onnx, write_artefact  # noqa: PLC0415

    template = read_card(ROOT / "exports" / "digits" / "1")
    stages = tuple(stage.model_copy(update={"channels": 2 * stage.channels}) for stage in template.stages)
    spec = template.input.model_copy(update={"channels": 3, "mean": (0.5,) * 3, "std": (0.25,) * 3})
    pixels = [read_input(to_jpeg(crop, 32), spec) for crop in islice(crops(), 128)]
    torch.manual_seed(0)
    network = create_model(
        "vgg16", method="S3", num_classes=10, in_channels=3, width=0.5, taps=[stage.name for stage in stages]
    )
    seen = Normalize(spec.mean, spec.std)(torch.from_numpy(np.stack(pixels)))
    with torch.no_grad():
        for _ in range(10):
            network.train()(seen)
        # random heads prefer one class whatever they see, and hardly; without the mean, and larger, the classes differ
        logits = network.eval()(seen).logits
        network.heads[network.head_names[0]].bias -= logits.mean(dim=0) / network.attention.matrix()[0]
        for head in network.heads.values():
            head.weight *= 2 / logits.std(dim=0).mean()
            head.bias *= 2 / logits.std(dim=0).mean()
    card = template.model_copy(
        update={
            "name": "half-width",
            "version": "1",
            "classes": CLASSES,
            "input": spec,
            "backbone": template.backbone.model_copy(update={"width": 0.5}),
            "stages": stages,
            "branch_weights": tuple(map(tuple, network.attention.matrix().tolist())),
        }
    )
    return write_artefact(exports, card, to_onnx(network, card))


def read_card(folder: Path) -> ModelCard:
    """The card of an artefact."""
    return ModelCard.from_json((folder / CARD_FILE).read_bytes(), folder / CARD_FILE)


def make_images(model: Path, folder: Path, side: int, count: int) -> Images:
    """Crops of photographs as JPEGs of quality 90, of as many classes as the model finds in them.

    Only such that have one class by two ways of reading them: this project's, which decodes a large JPEG at a smaller
    scale, and the plain one that the peers use. So there is one right answer for all servers.

    Args:
        model: the artefact's folder.
        folder: where the files go.
        side: of the square images, in pixels.
        count: how many.

    Raises:
        InterflowError: the model takes grey images, or too few crops have one class.
    """
    spec = read_card(model).input
    if spec.channels != 3:
        raise InterflowError(f"{model}: takes grey images; serving is measured with a model for colour.")
    session = open_session(model, threads=1)
    by_class: dict[int, list[tuple[bytes, np.ndarray, np.ndarray, np.ndarray]]] = {}
    for crop in islice(crops(), 6 * count):
        jpeg = to_jpeg(crop, side)
        ours = read_input(jpeg, spec)
        both = {IMAGE: np.stack([ours, _read_plainly(jpeg, spec)])}
        logits, branch_logits = session.run([LOGITS, BRANCH_LOGITS], both)
        first, second = logits.argmax(axis=1)
        if first == second:
            by_class.setdefault(int(first), []).append((jpeg, ours, logits[0], branch_logits[0]))
    chosen = list(islice(_in_turns(list(by_class.values())), count))
    if len(chosen) < count:
        raise InterflowError(f"of {6 * count} crops only {len(chosen)} have one class by both ways of reading them.")
    files = [folder / f"{side}px-{number}.jpg" for number in range(count)]
    for file, (jpeg, *_) in zip(files, chosen, strict=True):
        file.write_bytes(jpeg)
    pixels, logits, branch_logits = (np.stack([image[part] for image in chosen]) for part in (1, 2, 3))
    classes = read_card(model).classes
    labels = [classes[index] for index in logits.argmax(axis=1)]
    return Images(f"{side}x{side} JPEG", files, pixels, logits, branch_logits, labels)


def open_session(model: Path, threads: int) -> onnxruntime.InferenceSession:
    """The artefact in plain onnxruntime on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model / MODEL_FILE, options, ["CPUExecutionProvider"])


def with_version(model: Path, version: int, temperature: float, exports: Path) -> Path:
    """A copy of an artefact as another version, whose confidences tell it from others: its temperature is its own."""
    import onnx  # noqa: PLC0415 - the measurements that need no second version run without

    from model.contract import METADATA_KEY  # noqa: PLC0415
    from training.artefact import write_artefact  # noqa: PLC0415

    card = read_card(model).model_copy(update={"version": str(version), "temperature": temperature})
    graph = onnx.load(model / MODEL_FILE)
    onnx.helper.set_model_props(graph, {METADATA_KEY: card.to_json()})
    return write_artefact(exports, card, graph.SerializeToString())


def crops() -> Iterator[Image.Image]:
    """Squares of the photographs, of 200 pixels and up; the same ones every time, without end."""
    import skimage  # noqa: PLC0415 - only who makes images needs it

    folder = Path(skimage.__file__).parent / "data"
    photographs = [Image.open(folder / name).convert("RGB") for name in PHOTOGRAPHS]
    noise = np.random.default_rng(0)
    while True:
        for photograph in photographs:
            side = int(noise.integers(200, min(photograph.size) + 1))
            left, top = (int(noise.integers(0, length - side + 1)) for length in photograph.size)
            yield photograph.crop((left, top, left + side, top + side))


def to_jpeg(crop: Image.Image, side: int) -> bytes:
    """A square of so many pixels a side, of quality 90."""
    buffer = io.BytesIO()
    crop.resize((side, side), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _read_plainly(jpeg: bytes, spec: InputSpec) -> np.ndarray:
    """As the peers read an image."""
    size = (spec.width, spec.height)
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB").resize(size, Image.Resampling.BILINEAR))


def _in_turns(groups: Sequence[Sequence[tuple]]) -> Iterator[tuple]:
    """One of each group, then the next of each, until all are empty."""
    for place in range(max(map(len, groups), default=0)):
        yield from (group[place] for group in groups if place < len(group))


def tensor_request(pixels: np.ndarray, batch: int) -> tuple[bytes, int]:
    """A request of the Open Inference Protocol with binary tensors: the body, and its JSON's length."""
    images = np.resize(pixels, (batch, *pixels.shape[1:]))
    text = json.dumps(
        {
            "inputs": [
                {
                    "name": IMAGE,
                    "shape": images.shape,
                    "datatype": "UINT8",
                    "parameters": {"binary_data_size": images.nbytes},
                }
            ],
            "outputs": [{"name": LOGITS, "parameters": {"binary_data": True}}],
        }
    ).encode()
    return text + images.tobytes(), len(text)
