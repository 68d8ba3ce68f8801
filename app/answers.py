"""From one image's outputs to what people read: the answer, what each stage said and counted, what layers drew on."""

import base64
import math
from collections.abc import Sequence

import numpy as np

from app.errors import InferenceError
from app.inference import STOPS, Network, Outputs
from app.schemas import Exit, Interpretation, LayerAttention, Maps, Prediction, SeenBox, StageAnswer, StageMaps
from model.contract import BRANCH_LOGITS, BRANCH_WEIGHTS, LAYER_ATTENTION, LOGITS, ModelCard, branch_map_name
from model.explain import below_highest, contribution_maps, contributions, doubts, shares, softmax
from model.images import Seen

RANKING = "ranking"
"""int (N, 1 + B, K): classes, most confident first, of the fused answer and then of each stage's reading."""
CONFIDENCES = "confidences"
"""float64 (N, 1 + B, K): in the order of the ranking; NaN where an image's logits are not finite, and of stages that
it did not reach."""
WEIGHTS, CONTRIBUTIONS, SHARES = "weights", "contributions", "shares"
"""(N, B), weights and contributions float32, shares float64: each stage's, for the class of the answer; the shares only
of images that reached the last stage."""
DOUBTS = "doubts"
"""float64 (N,): NaN of images that did not reach the last stage, and where the card has no doubt."""
READ_OUTPUTS = (RANKING, CONFIDENCES, WEIGHTS, CONTRIBUTIONS, SHARES, DOUBTS, STOPS)

ALL_CLASSES = 32
"""Up to so many, maps are sent of every class."""
PREDICTION_BYTES = 64
"""Of one class in a list as JSON, beside its label."""


class Interpreter:
    """Reads a model's outputs by its card: `read` a whole batch at once, `interpret` one image of it.

    Args:
        card: classes, stages, blocks with attention, reading scales and temperature.
    """

    def __init__(self, card: ModelCard) -> None:
        self._card = card
        self._longest_label = max(map(len, card.classes))
        self._map_names = [branch_map_name(branch) for branch in range(len(card.stages))]
        self.map_values = len(card.classes) * sum(math.prod(stage.map_size) for stage in card.stages)
        """Of one image, over all stages."""
        self._unevaluated = [
            StageAnswer(
                name=stage.name,
                depth=stage.depth,
                prediction=None,
                top_k=[],
                weight=None,
                contribution=None,
                share=None,
                agrees=None,
                evaluated=False,
            )
            for stage in card.stages
        ]
        self._scales = np.asarray(card.reading_scales)
        self._doubt = card.doubt.coefficients if card.doubt else None

    def wanted(self, layers: bool = False, maps: bool = False) -> list[str]:
        """Names of the outputs that `interpret` takes and, with `maps`, `contribution_maps` and `maps`."""
        names = [*READ_OUTPUTS, *([LAYER_ATTENTION] if layers else [])]
        return [*names, BRANCH_WEIGHTS, *self._map_names] if maps else names

    def answer_bytes(self, top_k: int, maps: bool = False) -> int:
        """How many bytes the lists of classes and, with `maps`, the maps of one image's answer have as JSON at most,
        about."""
        classes, lists = len(self._card.classes), 1 + len(self._card.stages)
        listed = min(top_k, classes)
        size = lists * listed * (PREDICTION_BYTES + self._longest_label)
        if maps:
            planes = 1 + (classes if classes <= ALL_CLASSES else min(classes, lists * listed))
            size += planes * self.map_values // classes * 16 // 3  # float32 in base64
        return size

    def read(self, outputs: Outputs) -> Outputs:
        """`READ_OUTPUTS` of a batch, from the network's logits, branch logits and branch weights.

        The answer to an image that stopped early (`STOPS`) is the reading of that stage.
        """
        branch_logits, weights = outputs[BRANCH_LOGITS], outputs[BRANCH_WEIGHTS]
        images, last = np.arange(len(branch_logits)), branch_logits.shape[1] - 1
        stops = outputs.get(STOPS)
        # the fused answer and the stages' readings are softmaxes over the same classes: one of all, fused first
        scaled = np.empty((len(images), 2 + last, branch_logits.shape[2]))
        scaled[:, 0] = below_highest(outputs[LOGITS], self._card.temperature, self._card.power)
        scaled[:, 1:] = self._scales * branch_logits
        if stops is None:
            stops = np.full(len(images), last)
        else:
            early = np.flatnonzero(stops < last)
            scaled[early, 0] = scaled[early, 1 + stops[early]]
        finite = np.isfinite(scaled)
        unknown = None  # as nearly always, and each step for a batch is one for which the network's CPUs wait
        if not finite.all():
            reached = np.arange(-1, last + 1) <= stops[:, np.newaxis]
            broken = (reached & ~finite.all(axis=2)).any(axis=1, keepdims=True)
            unknown = ~reached | broken
            scaled[unknown] = 0
            branch_logits = np.where(unknown[:, 1:, np.newaxis], 0, branch_logits)
        confidences = softmax(scaled)
        ranking = np.argsort(-scaled, axis=2, kind="stable")
        confidences = np.take_along_axis(confidences, ranking, axis=2)
        doubt = np.full(len(images), np.nan)
        if self._doubt is not None:
            known = slice(None) if unknown is None else ~unknown.any(axis=1)
            doubt[known] = doubts(confidences[known, 0], confidences[known, 1:], self._doubt)
        if unknown is not None:
            confidences[unknown] = np.nan
        answers = ranking[:, 0, 0]
        added = contributions(branch_logits, weights)
        return {
            RANKING: ranking,
            CONFIDENCES: confidences,
            WEIGHTS: weights[images, :, answers],
            CONTRIBUTIONS: added[images, :, answers],
            SHARES: shares(added, answers),
            DOUBTS: doubt,
            STOPS: stops,
        }

    def interpret(self, outputs: Outputs, image: int, top_k: int, *, adaptive: bool = False) -> Interpretation:
        """Put one image's outputs into words.

        Args:
            outputs: those `wanted`, of a batch; with those of layers, the answer says what the blocks drew on, too.
            image: its place in the batch.
            top_k: how many classes to list; all where there are fewer.
            adaptive: the image was allowed to stop early, so that the answer says whether it did.

        Raises:
            InferenceError: the network's outputs are not finite.
        """
        classes = self._card.classes
        rankings: list[list[Prediction]] = [
            [
                {"label": classes[index], "index": index, "confidence": confidence}
                for index, confidence in zip(indices, confidences, strict=True)
            ]
            for indices, confidences in zip(
                outputs[RANKING][image, :, :top_k].tolist(),
                outputs[CONFIDENCES][image, :, :top_k].tolist(),
                strict=True,
            )
        ]
        said, *readings = rankings
        if math.isnan(said[0]["confidence"]):
            raise not_finite()
        answer, stop = said[0]["index"], int(outputs[STOPS][image])
        whole = stop == len(self._card.stages) - 1
        stages = [
            StageAnswer(
                name=stage.name,
                depth=stage.depth,
                prediction=reading[0],
                top_k=reading,
                weight=weight,
                contribution=contribution,
                share=share if whole else None,
                agrees=reading[0]["index"] == answer,
                evaluated=True,
            )
            for stage, reading, weight, contribution, share in zip(
                self._card.stages[: stop + 1],
                readings,
                outputs[WEIGHTS][image].tolist(),
                outputs[CONTRIBUTIONS][image].tolist(),
                outputs[SHARES][image].tolist(),
                strict=False,  # an image that stopped early has more stages than were evaluated
            )
        ]
        interpretation = Interpretation(
            prediction=said[0],
            top_k=said,
            stages=[*stages, *self._unevaluated[stop + 1 :]],
            agreement=sum(stage["agrees"] is True for stage in stages) / len(stages),
        )
        if self._doubt is not None:
            interpretation["doubt"] = float(outputs[DOUBTS][image]) if whole else None
        if adaptive:
            at = self._card.stages[stop]
            interpretation["exit"] = None if whole else Exit(stage=at.name, depth=at.depth)
        if LAYER_ATTENTION in outputs:
            interpretation["layer_attention"] = self._layer_attention(outputs[LAYER_ATTENTION][image])
        return interpretation

    def contribution_maps(self, outputs: Outputs, image: int) -> list[np.ndarray]:
        """Of one image: for each stage (K, h, w), as `model.explain.contribution_maps`."""
        return contribution_maps([outputs[name][image] for name in self._map_names], outputs[BRANCH_WEIGHTS][image])

    def maps(self, outputs: Outputs, image: int, said: Interpretation, box: Seen) -> Maps:
        """One image's contribution maps as they are sent.

        Args:
            outputs: those `wanted`, of a batch.
            image: its place in the batch.
            said: what `interpret` made of the image; of a model of many classes, only the listed ones are sent.
            box: what of the upright image the network saw.
        """
        classes = list(range(len(self._card.classes)))
        if len(classes) > ALL_CLASSES:
            listed = [said["top_k"], *(stage["top_k"] for stage in said["stages"])]
            classes = sorted({prediction["index"] for top_k in listed for prediction in top_k})
        stages = []
        for stage, values in zip(self._card.stages, self.contribution_maps(outputs, image), strict=True):
            planes = np.concatenate([values[classes], values.mean(axis=0, keepdims=True)]).astype("<f4", copy=False)
            text = base64.b64encode(planes.tobytes()).decode("ascii")
            stages.append(StageMaps(name=stage.name, shape=list(planes.shape), values=text))
        return Maps(
            box=SeenBox(left=box.left, top=box.top, right=box.right, bottom=box.bottom), classes=classes, stages=stages
        )

    def _layer_attention(self, weights: np.ndarray) -> list[LayerAttention]:
        """One image's rows (L, S), named by the card."""
        if not np.isfinite(weights).all():
            raise not_finite()
        return [
            LayerAttention(
                block=row.block,
                module=row.module,
                kind=row.kind,
                sources=[
                    {"name": name, "weight": weight}
                    for name, weight in zip(row.sources, of_row, strict=False)  # a row is padded beyond its sources
                ],
            )
            for row, of_row in zip(self._card.layer_attention, weights.tolist(), strict=True)
        ]


class ReadNetwork:
    """A network that gives `READ_OUTPUTS`, too: once for a batch, by the lane that ran it, which costs an image less
    than half of what it would in the event loop by itself.

    Args:
        network: to run.
        interpreter: by its card.
    """

    def __init__(self, network: Network, interpreter: Interpreter) -> None:
        self._network = network
        self._interpreter = interpreter

    def run(
        self, images: np.ndarray, names: Sequence[str], thresholds: np.ndarray | None = None, *, alone: bool = False
    ) -> Outputs:
        """As `Network.run`."""
        own = [name for name in names if name not in READ_OUTPUTS]
        if len(own) == len(names):
            return self._network.run(images, names, thresholds, alone=alone)
        whole = dict.fromkeys([*own, LOGITS, BRANCH_LOGITS, BRANCH_WEIGHTS])
        outputs = self._network.run(images, list(whole), thresholds, alone=alone)
        return {**outputs, **self._interpreter.read(outputs)}


def not_finite() -> InferenceError:
    """Of an image whose confidences are NaN."""
    return InferenceError("the network gave numbers that are not finite for this image.")
