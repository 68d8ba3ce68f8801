"""What a network says of a data set, and every figure that follows. Fractions, not percent.

One pass over the images; then functions of its outputs, those of the server and of the card wherever these have them.
"""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from tqdm import tqdm

from model.explain import contribution_maps, fused_confidences, readings, shares
from training import calibration
from training.calibration import ECE_BINS, Predictions, adaptive_ece
from training.evaluation_data import EvaluationData
from training.loop import NotFiniteError
from training.subjects import Outputs, Subject

FORMAT_VERSION = 1
BATCH = 64
SHOWN = 12
"""Images shown of each kind."""
CONFUSIONS_LISTED = 10
SHARE_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Residuals:
    """Largest differences between what should be equal, over all images; B stages.

    Attributes:
        logits: between the fused logits and the sums of all stages' contribution maps.
        branch_logits: (B,) between the branch logits and the means of their class maps.
        logit_scale: the largest magnitude of a fused logit.
        branch_scales: (B,) the same of the branch logits.
    """

    logits: float
    branch_logits: np.ndarray
    logit_scale: float
    branch_scales: np.ndarray


@dataclass(frozen=True)
class Evaluation:
    """A network's outputs over a data set.

    Attributes:
        predictions: of all images, in the order of the data.
        residuals: of the exact sums.
        activity: for each stage the mean activity of its channels by class, (K, C), see `class_selectivity`.
    """

    subject: Subject
    data: EvaluationData
    predictions: Predictions
    residuals: Residuals
    activity: list[np.ndarray]


def evaluate(subject: Subject, data: EvaluationData, workers: int) -> Evaluation:
    """Run a network over all images of a data set, with progress on a terminal.

    Args:
        subject: the network.
        data: the images.
        workers: processes that decode images which are not in memory.

    Raises:
        NotFiniteError: it gives numbers that are not finite.
    """
    classes, stages = len(subject.card.classes), len(subject.card.stages)
    branch_logits, weights = [], np.empty(0)
    largest, branch_largest = np.zeros(2), np.zeros((2, stages))  # residual and scale
    sums: list[np.ndarray] = []
    with tqdm(total=len(data.images), desc="evaluating", unit="image", disable=None) as bar:
        for images, labels in data.images.in_order(BATCH, workers):
            outputs = subject.forward(images.numpy())
            if not np.isfinite(outputs.logits).all() or not np.isfinite(outputs.branch_logits).all():
                raise NotFiniteError(f"{subject.folder} gives numbers that are not finite; train it again.")
            branch_logits.append(outputs.branch_logits)
            weights = outputs.branch_weights[0]
            for record, found in zip((largest, branch_largest), _residuals(outputs), strict=True):
                np.maximum(record, found, out=record)
            means = [np.maximum(feature, 0).mean(axis=(2, 3), dtype=np.float64) for feature in outputs.features]
            sums = sums or [np.zeros((classes, mean.shape[1])) for mean in means]
            for total, mean in zip(sums, means, strict=True):
                np.add.at(total, labels.numpy(), mean)
            bar.update(len(labels))
    counts = data.images.labels.bincount(minlength=classes).numpy()
    return Evaluation(
        subject,
        data,
        Predictions(np.concatenate(branch_logits), weights, data.images.labels.numpy()),
        Residuals(float(largest[0]), branch_largest[0], float(largest[1]), branch_largest[1]),
        [total / counts[:, None] for total in sums],
    )


def _residuals(outputs: Outputs) -> tuple[np.ndarray, np.ndarray]:
    """Largest residual and largest magnitude over a batch: of the logits (2,), and of the branch logits (2, B)."""
    maps = contribution_maps(outputs.branch_maps, outputs.branch_weights)
    total = np.sum([part.sum(axis=(2, 3), dtype=np.float64) for part in maps], axis=0)
    means = np.stack([part.mean(axis=(2, 3), dtype=np.float64) for part in outputs.branch_maps], axis=1)
    return (
        np.array([np.abs(total - outputs.logits).max(), np.abs(outputs.logits).max()]),
        np.stack(
            [np.abs(values).max(axis=(0, 2)) for values in (means - outputs.branch_logits, outputs.branch_logits)]
        ),
    )


def class_selectivity(activity: np.ndarray) -> np.ndarray:
    """How much each channel prefers one class: (highest - others) / (highest + others) of its mean activity by class.

    Of Morcos et al. (2018), as in the AFINets paper's Fig. 4: "others" is the mean over the classes but the highest;
    0 is a channel that tells no class from another, 1 one that fires for a single class.

    Args:
        activity: (K, C), not negative: the mean over a class's images and all positions of the positive part of the
            tapped feature map. (Taking that part is ours: the index is made for what comes out of a ReLU, where it
            changes nothing; not all backbones end their stages with one.)

    Returns:
        (C',) in 0..1, of the channels that are ever active.
    """
    active = activity[:, activity.any(axis=0)]
    ordered = np.sort(active, axis=0)
    highest, others = ordered[-1], ordered[:-1].mean(axis=0)
    return (highest - others) / (highest + others)


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence in bits: 0 where two beliefs are the same, 1 where they exclude each other.

    Args:
        p, q: (M, K) probabilities.

    Returns:
        (M,).
    """

    def entropy(values: np.ndarray) -> np.ndarray:
        return -(values * np.log2(np.where(values > 0, values, 1))).sum(axis=1)

    return np.clip(entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2, 0, 1)


def reliability(probabilities: np.ndarray, labels: np.ndarray) -> list[dict[str, Any]]:
    """The bins of a reliability diagram, 15 of equal width: images, mean confidence and accuracy (None where empty)."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    edges = np.linspace(0, 1, ECE_BINS + 1)
    rows = np.clip(np.digitize(confidence, edges) - 1, 0, ECE_BINS - 1)
    images = np.bincount(rows, minlength=ECE_BINS)
    sums = [np.bincount(rows, values, minlength=ECE_BINS) for values in (confidence, right)]
    return [
        {
            "from": float(edges[i]),
            "to": float(edges[i + 1]),
            "images": int(images[i]),
            "confidence": float(sums[0][i] / images[i]) if images[i] else None,
            "accuracy": float(sums[1][i] / images[i]) if images[i] else None,
        }
        for i in range(ECE_BINS)
    ]


def figures(evaluation: Evaluation) -> dict[str, Any]:
    """All numbers of the report, as JSON has them."""
    subject, data, predictions = evaluation.subject, evaluation.data, evaluation.predictions
    card, labels = subject.card, predictions.labels
    answers = predictions.logits.argmax(axis=1)
    beliefs = readings(predictions.branch_logits, np.array(card.reading_scales))
    agrees = beliefs.argmax(axis=2) == answers[:, None]
    counts = calibration.confusion(predictions)
    return {
        "format_version": FORMAT_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "subject": {"kind": subject.kind, "folder": str(subject.folder), "runtime": subject.runtime},
        "data": {
            "name": data.name,
            "split": data.split,
            "images": len(labels),
            "skipped": data.skipped,
            "trained_on": data.seen,
        },
        "fused": _fused(predictions, card.temperature, card.power),
        "stages": _stages(evaluation, beliefs, agrees),
        "agreement": {
            "mean": float(agrees.mean()),
            "by_stages_that_agree": _by_agreement(agrees.sum(axis=1), answers == labels, len(card.stages)),
        },
        "classes": _classes(counts, card.classes),
        "confusion": {"rows": "true class", "columns": "answer", "counts": counts.tolist()},
        "confusions": _confusions(counts, card.classes),
        "completeness": _completeness(evaluation.residuals, [stage.name for stage in card.stages]),
        "disagreements": _disagreements(evaluation, beliefs),
        "errors": _errors(evaluation, beliefs),
        "card": json.loads(card.to_json()),
    }


def _fused(predictions: Predictions, temperature: float, power: float) -> dict[str, Any]:
    probabilities = fused_confidences(predictions.logits, temperature, power)
    return {
        "accuracy": calibration.fused_accuracy(predictions),
        "macro_f1": calibration.macro_f1(predictions),
        "auroc": calibration.fused_auroc(predictions, temperature, power),
        "mean_confidence": float(probabilities.max(axis=1).mean()),
        "temperature": temperature,
        "power": power,
        "nll": calibration.fused_nll(predictions, temperature, power),
        "ece": calibration.fused_ece(predictions, temperature, power),
        "ece_adaptive": adaptive_ece(probabilities, predictions.labels),
        "nll_at_temperature_1": calibration.fused_nll(predictions, 1.0),
        "ece_at_temperature_1": calibration.fused_ece(predictions, 1.0),
        "reliability": reliability(probabilities, predictions.labels),
    }


def _stages(evaluation: Evaluation, beliefs: np.ndarray, agrees: np.ndarray) -> list[dict[str, Any]]:
    card, predictions = evaluation.subject.card, evaluation.predictions
    labels, logits, scales = predictions.labels, predictions.logits, np.array(card.reading_scales)
    accuracy = calibration.branch_accuracy(predictions, scales)
    ece, nll = calibration.branch_ece(predictions, scales), calibration.branch_nll(predictions, scales)
    counted = shares(predictions.contributions, logits.argmax(axis=1))
    stages: list[dict[str, Any]] = []
    for i, stage in enumerate(card.stages):
        without = logits - predictions.contributions[:, i]
        selectivity = class_selectivity(evaluation.activity[i])
        stages.append(
            {
                "name": stage.name,
                "depth": stage.depth,
                "map_size": list(stage.map_size),
                "accuracy": accuracy[i],
                "agreement": float(agrees[:, i].mean()),
                # of a single stage nothing would be left
                "accuracy_without": float((without.argmax(axis=1) == labels).mean()) if len(card.stages) > 1 else None,
                "importance": float(counted[:, i].mean()),
                "share": {f"{q:g}": float(np.quantile(counted[:, i], q)) for q in SHARE_QUANTILES},
                "weights": predictions.branch_weights[i].tolist(),
                "mean_confidence": float(beliefs[:, i].max(axis=1).mean()),
                "nll": nll[i],
                "ece": ece[i],
                "ece_adaptive": adaptive_ece(beliefs[:, i], labels),
                "reliability": reliability(beliefs[:, i], labels),
                "selectivity": {
                    "mean": float(selectivity.mean()) if len(selectivity) else None,
                    "channels": [round(float(value), 4) for value in selectivity],
                    "silent_channels": evaluation.activity[i].shape[1] - len(selectivity),
                },
            }
        )
    return stages


def _by_agreement(agreeing: np.ndarray, right: np.ndarray, stages: int) -> list[dict[str, Any]]:
    """How many images have so many stages that say what the whole does, and how often the whole is right then."""
    return [
        {
            "stages": count,
            "images": int((agreeing == count).sum()),
            "accuracy": float(right[agreeing == count].mean()) if (agreeing == count).any() else None,
        }
        for count in range(stages + 1)
    ]


def _classes(counts: np.ndarray, names: tuple[str, ...]) -> list[dict[str, Any]]:
    right, images, answered = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    return [
        {
            "name": name,
            "images": int(images[i]),
            "recall": float(right[i] / images[i]),
            "precision": float(right[i] / answered[i]) if answered[i] else None,
            "f1": float(2 * right[i] / (images[i] + answered[i])),
        }
        for i, name in enumerate(names)
    ]


def _confusions(counts: np.ndarray, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """What is most often taken for what."""
    off = counts - np.diag(counts.diagonal())
    pairs = zip(
        *np.unravel_index(np.argsort(-off, axis=None, kind="stable")[:CONFUSIONS_LISTED], off.shape), strict=True
    )
    return [
        {"class": names[true], "answer": names[answer], "images": int(off[true, answer])}
        for true, answer in pairs
        if off[true, answer]
    ]


def _completeness(residuals: Residuals, names: list[str]) -> dict[str, Any]:
    scales = np.where(residuals.branch_scales > 0, residuals.branch_scales, 1)
    return {
        "largest_residual": residuals.logits,
        "logit_scale": residuals.logit_scale,
        "relative": residuals.logits / (residuals.logit_scale or 1),
        "stages": [
            {"name": name, "largest_residual": float(residual), "relative": float(residual / scale)}
            for name, residual, scale in zip(names, residuals.branch_logits, scales, strict=True)
        ],
    }


def _disagreements(evaluation: Evaluation, beliefs: np.ndarray) -> list[dict[str, Any]]:
    """Images on which the shallowest and the deepest stage believe most differently."""
    if beliefs.shape[1] == 1:
        return []
    bits = divergence(beliefs[:, 0], beliefs[:, -1])
    shown = []
    for i in np.argsort(-bits, kind="stable")[:SHOWN].tolist():
        logits = evaluation.predictions.logits[i]
        said = [int(beliefs[i, 0].argmax()), int(beliefs[i, -1].argmax()), *np.argsort(-logits).tolist()]
        rival = next(index for index in said if index != logits.argmax())
        shown.append(_image(evaluation, beliefs, i, rival) | {"divergence_bits": float(bits[i])})
    return shown


def _errors(evaluation: Evaluation, beliefs: np.ndarray) -> list[dict[str, Any]]:
    """Wrong answers, the most confident first."""
    predictions = evaluation.predictions
    card = evaluation.subject.card
    confidence = fused_confidences(predictions.logits, card.temperature, card.power).max(axis=1)
    wrong = np.flatnonzero(predictions.logits.argmax(axis=1) != predictions.labels)
    chosen = wrong[np.argsort(-confidence[wrong], kind="stable")][:SHOWN]
    return [_image(evaluation, beliefs, i, int(predictions.labels[i])) for i in chosen.tolist()]


def _image(evaluation: Evaluation, beliefs: np.ndarray, index: int, rival: int) -> dict[str, Any]:
    """One image: its class, the answer, what each stage made of it, and what spoke for the answer against `rival`."""
    card, predictions, paths = evaluation.subject.card, evaluation.predictions, evaluation.data.images.paths
    logits = predictions.logits[index]
    answer = int(logits.argmax())
    contributions = predictions.contributions[index]
    counted = shares(contributions[None], np.array([answer]))[0]
    return {
        "index": index,
        "file": None if paths is None else "/".join(paths[index].parts[-2:]),
        "class": card.classes[predictions.labels[index]],
        "answer": card.classes[answer],
        "confidence": float(fused_confidences(logits, card.temperature, card.power)[answer]),
        "rival": card.classes[rival],
        "difference": float(logits[answer] - logits[rival]),
        "stages": [
            {
                "name": stage.name,
                "answer": card.classes[int(beliefs[index, i].argmax())],
                "confidence": float(beliefs[index, i].max()),
                "contribution": float(contributions[i, answer]),
                "difference": float(contributions[i, answer] - contributions[i, rival]),
                "share": float(counted[i]),
            }
            for i, stage in enumerate(card.stages)
        ],
    }
