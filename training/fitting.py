"""All of a card that is fitted on held-out images and measured on test, from a network's outputs on both.

One way for every network: a run's, a shorter one, or one in fewer bits.
"""

from typing import Any

from model.contract import Metrics
from model.explain import fused_confidences
from training import calibration
from training.calibration import Predictions
from training.doubt import fit_doubt
from training.exits import fit_exits


def fitted_fields(
    held_out: Predictions,
    test: Predictions,
    *,
    per_class: bool,
    work: tuple[float, ...],
    data: str,
    fitted_on: str,
    seed: int,
) -> dict[str, Any]:
    """The fields of a `ModelCard` that come from data.

    Args:
        held_out: for all that is fitted.
        test: for what is measured, once.
        per_class: one reading scale per stage and class, else one per stage.
        work: of the stages, as `StageInfo.work`.
        data: name of the data set.
        fitted_on: says what `held_out` is.
        seed: of the training run.
    """
    scales = calibration.fit_reading_scales(held_out, per_class)
    temperature, power = calibration.fit_confidence(held_out)
    counts = calibration.confusion(test)
    return {
        "branch_weights": _rows(held_out.branch_weights),
        "reading_scales": _rows(scales),
        "temperature": temperature,
        "power": power,
        "doubt": fit_doubt(held_out, test, scales, temperature, power),
        "branch_importance": tuple(calibration.importance(held_out).tolist()),
        "exits": fit_exits(held_out, test, scales, temperature, work=work, power=power),
        "fitted_on": fitted_on,
        "metrics": Metrics(
            data=data,
            split="test",
            images=len(test.labels),
            seed=seed,
            accuracy=calibration.fused_accuracy(test),
            macro_f1=calibration.macro_f1(test),
            auroc=calibration.fused_auroc(test, temperature, power),
            class_recall=tuple(calibration.class_recall(counts).tolist()),
            class_images=tuple(counts.sum(axis=1).tolist()),
            branch_accuracy=tuple(calibration.branch_accuracy(test, scales)),
            ece=calibration.fused_ece(test, temperature, power),
            branch_ece=tuple(calibration.branch_ece(test, scales)),
            ece_adaptive=calibration.adaptive_ece(fused_confidences(test.logits, temperature, power), test.labels),
            nll=calibration.fused_nll(test, temperature, power),
            branch_nll=tuple(calibration.branch_nll(test, scales)),
        ),
    }


def _rows(matrix: Any) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in matrix.tolist())
