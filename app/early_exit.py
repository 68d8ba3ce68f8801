"""Answers that stop early: a network's stages run in turn, each on those images that no stage was sure of yet."""

from collections.abc import Callable, Sequence

import numpy as np
import onnxruntime

from app.inference import STOPS, Outputs
from model.contract import BRANCH_LOGITS, BRANCH_WEIGHTS, IMAGE, ModelCard
from model.cut import READING, Segment, with_reading


class EarlyExit:
    """A network in pieces, which give together what the whole gives.

    Args:
        card: describes the network.
        segments: of its graph, from shallow to deep.
        open_model: makes a session of a serialised graph.
        sizes: of batches, as `padded`.
    """

    def __init__(
        self,
        card: ModelCard,
        segments: Sequence[Segment],
        open_model: Callable[[bytes], onnxruntime.InferenceSession],
        sizes: Sequence[int] | None,
    ) -> None:
        self._shapes = {name: [size for size in spec.shape if size is not None] for name, spec in card.outputs.items()}
        *shallow, deepest = segments
        scales = card.reading_scales
        segments = [*(with_reading(part, branch, scales[branch]) for branch, part in enumerate(shallow)), deepest]
        self._sessions = [open_model(segment.model) for segment in segments]
        self._segments = [segment._replace(model=b"") for segment in segments]  # the sessions have their own copies
        self._sizes = sizes
        self._shapes = {name: [size for size in spec.shape if size is not None] for name, spec in card.outputs.items()}
        self._weights = np.asarray(card.branch_weights, np.float32)
        self._crossing = [
            {name for segment in segments[place + 1 :] for name in segment.inputs} for place in range(len(segments))
        ]
        self._fetched: dict[tuple[str, ...], list[list[str]]] = {}

    def run(self, images: np.ndarray, names: Sequence[str], thresholds: np.ndarray) -> Outputs:
        """As `Network.run`; blocks."""
        last = len(self._sessions) - 1
        places = np.arange(len(images))  # of those that go on
        stops = np.full(len(images), last)
        read: list[tuple[np.ndarray, np.ndarray]] = []  # for each stage: places of the images, and its branch logits
        made: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # for each output: places, and values
        held: dict[str, np.ndarray] = {IMAGE: images}
        for stage, fetched in enumerate(self._to_fetch(tuple(names))):
            feeds = {name: padded(held[name], self._sizes) for name in self._segments[stage].inputs}
            for name, values in zip(fetched, self._sessions[stage].run(fetched, feeds), strict=True):
                held[name] = values[: len(places)]
                made[name] = places, held[name]
            if stage == last:
                break
            logits, confidence = (held.pop(name) for name in READING)
            read.append((places, logits))
            sure = confidence >= thresholds[places, stage]
            if sure.any():
                stops[places[sure]] = stage
                goes_on = ~sure
                places = places[goes_on]
                if not len(places):
                    break
                held = {name: values[goes_on] for name, values in held.items() if name in self._crossing[stage]}
        outputs = {name: self._of_all(name, made.get(name), len(images)) for name in names}
        if len(places) < len(images):
            if BRANCH_LOGITS in outputs:
                for stage, (of_stage, logits) in enumerate(read):
                    outputs[BRANCH_LOGITS][of_stage, stage] = logits
            if BRANCH_WEIGHTS in outputs:  # learned constants: those of an image that stopped early, too
                outputs[BRANCH_WEIGHTS][:] = self._weights
        return {**outputs, STOPS: stops}

    def _to_fetch(self, names: tuple[str, ...]) -> list[list[str]]:
        """What is asked of each segment: outputs that are wanted, what later ones take, and its reading."""
        if names not in self._fetched:
            self._fetched[names] = [
                [name for name in segment.outputs if name in names or name in crossing or name in READING]
                for segment, crossing in zip(self._segments, self._crossing, strict=True)
            ]
        return self._fetched[names]

    def _of_all(self, name: str, made: tuple[np.ndarray, np.ndarray] | None, count: int) -> np.ndarray:
        """An output of all images, NaN for those that it was not computed for."""
        if made is not None and len(made[0]) == count:
            return made[1]
        values = np.full((count, *self._shapes[name]), np.nan, np.float32)
        if made is not None:
            values[made[0]] = made[1]
        return values


def padded(images: np.ndarray, sizes: Sequence[int] | None) -> np.ndarray:
    """The images, or what is held of them, and zeros up to the next of the sizes that were warmed up.

    On CUDA only, where each new size costs a search for algorithms. On the CPU a batch of n takes n times as long as
    one image, or a little less, so padding would only add work.
    """
    size = next((size for size in sizes or () if size >= len(images)), len(images))
    if size == len(images):
        return images
    return np.concatenate([images, np.zeros((size - len(images), *images.shape[1:]), images.dtype)])
