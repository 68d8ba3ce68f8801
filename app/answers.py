"""From one image's outputs to what people read: the answer, and what each stage said and counted."""

from typing import NamedTuple

import numpy as np

from app.errors import InferenceError
from app.inference import Outputs
from app.schemas import Prediction, StageAnswer
from model.contract import ModelCard
from model.explain import contributions, readings, shares, softmax


class Interpretation(NamedTuple):
    """The part of an answer that the network decides."""

    prediction: Prediction
    top_k: list[Prediction]
    stages: list[StageAnswer]
    agreement: float


def interpret(card: ModelCard, outputs: Outputs, image: int, top_k: int) -> Interpretation:
    """Read one image's outputs by the model's card.

    Args:
        card: classes, stages, reading scales and temperature.
        outputs: of a batch.
        image: its place in the batch.
        top_k: how many classes to list; all where there are fewer.

    Raises:
        InferenceError: the outputs are not finite.
    """
    here = slice(image, image + 1)
    logits, branch_logits = outputs.logits[here], outputs.branch_logits[here]
    if not (np.isfinite(logits).all() and np.isfinite(branch_logits).all()):
        raise InferenceError("the network gave numbers that are not finite for this image.")
    ranking = _rank(softmax(logits / card.temperature)[0], card.classes, top_k)
    answer = ranking[0].index
    added = contributions(branch_logits, outputs.branch_weights[here])
    share = shares(added, np.array([answer]))[0]
    stages = []
    for index, reading in enumerate(readings(branch_logits, np.asarray(card.reading_scales))[0]):
        stage_ranking = _rank(reading, card.classes, top_k)
        stages.append(
            StageAnswer(
                name=card.stages[index].name,
                depth=card.stages[index].depth,
                prediction=stage_ranking[0],
                top_k=stage_ranking,
                weight=float(outputs.branch_weights[image, index, answer]),
                contribution=float(added[0, index, answer]),
                share=float(share[index]),
                agrees=stage_ranking[0].index == answer,
                evaluated=True,
            )
        )
    agreement = sum(stage.agrees for stage in stages) / len(stages)
    return Interpretation(ranking[0], ranking, stages, agreement)


def _rank(probabilities: np.ndarray, classes: tuple[str, ...], top_k: int) -> list[Prediction]:
    best = np.argsort(-probabilities, kind="stable")[:top_k]
    return [Prediction(label=classes[i], index=int(i), confidence=float(probabilities[i])) for i in best]
