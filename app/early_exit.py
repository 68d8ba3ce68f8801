"""Answers that stop early: a network's stages run in turn, each on those images that no stage was sure of yet."""

from collections.abc import Callable, Sequence

import numpy as np
import onnxruntime

from app.inference import STOPS, Outputs
from model.contract import BRANCH_LOGITS, BRANCH_WEIGHTS, IMAGE, LOGITS, ModelCard, branch_map_name
from model.cut import CONFIDENCE_READ, Segment, logits_read, with_readings
from model.explain import contributions


class EarlyExit:
    """A network in pieces, cut behind stages where images may stop, which give together what the whole gives.

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
        reading = [with_readings(segment, card.reading_scales) for segment in segments]
        self._sessions = [open_model(segment.model) for segment in reading]
        self._inputs = [segment.inputs for segment in reading]
        self._branches = [segment.branches for segment in reading]
        maps = {branch_map_name(branch) for branch in range(len(card.stages))}
        self._fetched = [[name for name in segment.outputs if name not in maps] for segment in reading]
        self._later = [{name for inputs in self._inputs[place:] for name in inputs} for place in range(1, len(reading))]
        self._weights = np.asarray(card.branch_weights, np.float32)
        self._sizes = sizes

    def run(self, images: np.ndarray, thresholds: np.ndarray) -> Outputs:
        """Logits, branch logits, branch weights and `STOPS` of N images, as `Network.run`; blocks.

        Args:
            images: uint8 (N, H, W, C).
            thresholds: (N, B - 1), infinite where an image is not to stop.
        """
        branch_logits = np.full((len(images), *self._weights.shape), np.nan, np.float32)
        stops = np.full(len(images), len(self._weights) - 1)
        places: slice | np.ndarray = slice(None)  # of those that go on: a slice is quicker to index by
        held = {IMAGE: images}
        for part, (session, inputs, fetched) in enumerate(
            zip(self._sessions, self._inputs, self._fetched, strict=True)
        ):
            count = len(held[inputs[0]])
            values = session.run(fetched, {name: padded(held[name], self._sizes) for name in inputs})
            held |= {name: value[:count] for name, value in zip(fetched, values, strict=True)}
            for branch in self._branches[part]:
                branch_logits[places, branch] = held[logits_read(branch)]
            if part == len(self._sessions) - 1:
                break
            stage = self._branches[part][-1]
            sure = held[CONFIDENCE_READ] >= thresholds[places, stage]
            if sure.any():
                going = np.arange(len(images))[places]
                stops[going[sure]] = stage
                places = going[~sure]
                if not len(places):
                    break
                held = {name: held[name][~sure] for name in self._later[part] if name in held}
        weights = np.empty_like(branch_logits)
        weights[:] = self._weights
        return {
            LOGITS: contributions(branch_logits, weights).sum(axis=1),
            BRANCH_LOGITS: branch_logits,
            BRANCH_WEIGHTS: weights,
            STOPS: stops,
        }


def padded(images: np.ndarray, sizes: Sequence[int] | None) -> np.ndarray:
    """The images, or what is held of them, and zeros up to the next of the sizes that were warmed up.

    On CUDA only, where each new size costs a search for algorithms. On the CPU a batch of n takes n times as long as
    one image, or a little less, so padding would only add work.
    """
    size = next((size for size in sizes or () if size >= len(images)), len(images))
    if size == len(images):
        return images
    return np.concatenate([images, np.zeros((size - len(images), *images.shape[1:]), images.dtype)])
