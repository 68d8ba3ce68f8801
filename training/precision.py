"""A network in fewer bits: its graph reduced, all that is fitted fitted anew on that, and held against float32."""

from dataclasses import dataclass

import numpy as np
import torch
from onnx import ModelProto
from tqdm import tqdm

from model.contract import BRANCH_LOGITS, BRANCH_WEIGHTS, IMAGE, AgainstFloat32, InterflowError, ModelCard
from model.cpu import cpu_features
from model.explain import readings
from training.calibration import Predictions, branch_accuracy, fused_accuracy
from training.data import ImageData
from training.fewer_bits import to_float16, to_int8
from training.fitting import fitted_fields
from training.splits import Split
from training.verify import open_graph, residuals

PRECISIONS = {"float32": "float32", "float16": "float16", "fp16": "float16", "int8": "int8"}
"""What one may ask for, and what the card calls it."""
SUFFIXES = {"float32": "", "float16": "-fp16", "int8": "-int8"}
"""Of the names of models: those in fewer bits are models of their own."""
TOLERANCE = 0.3
"""Points of test accuracy that fewer bits may cost, where nobody says."""
CALIBRATION_IMAGES = 512
BATCH = 50


@dataclass(frozen=True)
class Measured:
    """What a graph says of a split.

    Attributes:
        predictions: of its images.
        residual: the largest of both exact sums, as `AgainstFloat32.residual`.
    """

    predictions: Predictions
    residual: float


def reduced(
    model: ModelProto, card: ModelCard, data: ImageData, *, workers: int, precision: str, tolerance: float
) -> tuple[ModelProto, ModelCard]:
    """Bring a graph to fewer bits, and write the card that is true of it.

    Args:
        model: the float32 graph, as `training.artefact.to_graph` makes it.
        card: describes it; the stages' work is counted.
        data: that the network was trained on.
        workers: processes that read images which are not in memory.
        precision: "float16" or "int8".
        tolerance: points of test accuracy that may be lost.

    Returns:
        The reduced graph and its card.

    Raises:
        InterflowError: more is lost than `tolerance`; names the accuracies.
    """
    held_out, stages = data.val or data.train, len(card.stages)
    images = _some(held_out, workers)
    smaller = to_float16(model, stages) if precision == "float16" else to_int8(model, stages, images)

    whole = measure(model, card, data.test, workers, "float32, test")
    fitting = measure(smaller, card, held_out, workers, f"{precision}, held out")
    test = measure(smaller, card, data.test, workers, f"{precision}, test")
    fitted = fitted_fields(
        fitting.predictions,
        test.predictions,
        per_class=card.method.attention == "class",
        work=tuple(stage.work or 0.0 for stage in card.stages),
        data=card.metrics.data,
        fitted_on=card.fitted_on,
        seed=card.metrics.seed,
    )
    before, after = fused_accuracy(whole.predictions), fitted["metrics"].accuracy
    if 100 * (before - after) > tolerance + 1e-9:  # 0.3 points of 1000 images are three
        raise InterflowError(
            f"{card.name}: {after:.2%} of {len(data.test)} test images are right in {precision}, and {before:.2%} in "
            f"float32; {100 * (before - after):.2f} points are lost, and --tolerance allows {tolerance:g}. Export "
            f"it in another precision, or allow more."
        )
    scales, new_scales = np.asarray(card.reading_scales), np.asarray(fitted["reading_scales"])
    against = AgainstFloat32(
        accuracy=before,
        branch_accuracy=tuple(branch_accuracy(whole.predictions, scales)),
        agreement=float((whole.predictions.logits.argmax(1) == test.predictions.logits.argmax(1)).mean()),
        branch_agreement=tuple(
            (_read(whole.predictions, scales) == _read(test.predictions, new_scales)).mean(axis=0).tolist()
        ),
        residual=max(fitting.residual, test.residual),
        calibrated_on=len(images) if precision == "int8" else None,
        cpu=cpu_features(),
    )
    fields = dict(card) | fitted | {"precision": precision, "against_float32": against}
    return smaller, ModelCard.model_validate(fields)


def measure(model: ModelProto, card: ModelCard, split: Split, workers: int, name: str) -> Measured:
    """Ask a graph about every image of a split, in onnxruntime on the CPU, with progress on a terminal.

    Args:
        model: with the signature that the card promises.
        card: describes it.
        split: the images.
        workers: processes that read images which are not in memory.
        name: shown with the progress.

    Raises:
        InterflowError: it gives numbers that are not finite.
    """
    session, names = open_graph(model.SerializeToString()), list(card.outputs)
    branch_logits, residual = [], 0.0
    weights = np.empty(0)
    with tqdm(total=len(split), desc=name, unit="image", disable=None) as bar:
        for images, _ in split.in_order(BATCH, workers):
            values = dict(zip(names, session.run(names, {IMAGE: images.numpy()}), strict=True))
            branch_logits.append(values[BRANCH_LOGITS])
            weights = values[BRANCH_WEIGHTS][0]
            residual = max(residual, *residuals(values, card).values())
            bar.update(len(images))
    logits = np.concatenate(branch_logits)
    if not np.isfinite(logits).all():
        raise InterflowError(f"{name}: the graph gives numbers that are not finite; export it in another precision.")
    return Measured(Predictions(logits, weights, split.labels.numpy()), residual)


def summary(card: ModelCard) -> str:
    """What fewer bits changed, in a line."""
    against = card.against_float32
    assert against is not None, "the card of a float32 network"  # noqa: S101 - whoever asks knows
    return (
        f"{card.precision}: {card.metrics.accuracy:.2%} of the test images are right, {against.accuracy:.2%} in "
        f"float32; {against.agreement:.2%} have the same answer; the sums are exact to {against.residual:.1e}"
    )


def _some(split: Split, workers: int) -> np.ndarray:
    """Images from all over a split, uint8 (512 at most, height, width, channels)."""
    indices = torch.linspace(0, len(split) - 1, min(len(split), CALIBRATION_IMAGES)).round().long()
    images, _ = next(split.batches([indices], workers))
    return images.numpy()


def _read(predictions: Predictions, reading_scales: np.ndarray) -> np.ndarray:
    """Each stage's answer, (M, B)."""
    return readings(predictions.branch_logits, reading_scales).argmax(axis=2)
