"""From one image's outputs to what people read: the answer, what each stage said and counted, what layers drew on."""

from typing import NamedTuple

import numpy as np

from app.errors import InferenceError
from app.inference import Outputs
from app.schemas import LayerAttention, LayerSource, Prediction, StageAnswer
from model.contract import ModelCard
from model.explain import contributions, readings, shares, softmax


class Interpretation(NamedTuple):
    """The part of an answer that the network decides."""

    prediction: Prediction
    top_k: list[Prediction]
    stages: list[StageAnswer]
    agreement: float
    layer_attention: list[LayerAttention]


def interpret(card: ModelCard, outputs: Outputs, image: int, top_k: int, layers: bool = False) -> Interpretation:
    """Read one image's outputs by the model's card.

    Args:
        card: classes, stages, blocks with attention, reading scales and temperature.
        outputs: of a batch.
        image: its place in the batch.
        top_k: how many classes to list; all where there are fewer.
        layers: say what the network's blocks drew on, too, where they have attention of their own.

    Raises:
        InferenceError: the outputs are not finite.
    """
    here = slice(image, image + 1)
    logits, branch_logits = outputs.logits[here], outputs.branch_logits[here]
    _require_finite(logits, branch_logits)
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
    attention = outputs.layer_attention if layers else None
    drawn_on = [] if attention is None else _layer_attention(card, attention[image])
    return Interpretation(ranking[0], ranking, stages, agreement, drawn_on)


def _layer_attention(card: ModelCard, weights: np.ndarray) -> list[LayerAttention]:
    """One image's rows (L, S), named by the card."""
    _require_finite(weights)
    return [
        LayerAttention(
            block=row.block,
            module=row.module,
            kind=row.kind,
            sources=[
                LayerSource(name=name, weight=float(weight))
                for name, weight in zip(row.sources, of_row, strict=False)  # a row is padded beyond its sources
            ],
        )
        for row, of_row in zip(card.layer_attention, weights, strict=True)
    ]


def _require_finite(*arrays: np.ndarray) -> None:
    if not all(np.isfinite(array).all() for array in arrays):
        raise InferenceError("the network gave numbers that are not finite for this image.")


def _rank(probabilities: np.ndarray, classes: tuple[str, ...], top_k: int) -> list[Prediction]:
    best = np.argsort(-probabilities, kind="stable")[:top_k]
    return [Prediction(label=classes[i], index=int(i), confidence=float(probabilities[i])) for i in best]
