"""From pixels to branch outputs without blocking the event loop: what routes ask, and the network behind it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

Outputs = Mapping[str, np.ndarray]
"""Float32 arrays by the artefact's own output names (`model.contract`), each with the images in dimension 0."""

STOPS = "stops"
"""int (N,), beside the outputs where thresholds were given: index of the stage that answers each image."""


@dataclass(frozen=True, slots=True)
class Inferred:
    """The outputs that were asked for, the time they took in milliseconds, and the company they had."""

    outputs: Outputs
    queue_ms: float
    inference_ms: float
    batch: int
    """Images in the batch that the network ran; of several batches, in the largest."""


class Network(Protocol):
    """Blocking forward pass; `app.session.Session` is one."""

    def run(
        self, images: np.ndarray, names: Sequence[str], thresholds: np.ndarray | None = None, *, alone: bool = False
    ) -> Outputs:
        """uint8 (N, H, W, C) to the named outputs of N images; called by several threads at a time.

        Args:
            images: as above.
            names: of the outputs to compute.
            thresholds: (N, B - 1): an image stops at the first stage whose reading is as confident as that. Then only
                logits, branch logits and branch weights are to be had; those of deeper stages are NaN, and `STOPS` says
                where each image stopped.
            alone: nothing else needs the CPUs, so that it may take them all to be done sooner.

        Raises:
            InferenceError: the network failed.
        """


class Inference(Protocol):
    """How routes ask a network; `app.batcher.Batcher` is one."""

    async def infer(
        self,
        images: np.ndarray,
        names: Sequence[str],
        deadline: float | None = None,
        thresholds: Sequence[float] | None = None,
        *,
        more_to_come: bool = False,
    ) -> Inferred:
        """uint8 (N, H, W, C) to the named outputs of N images, in their order.

        Args:
            images: not changed until this returns.
            names: of the outputs; only these are computed and given.
            deadline: moment of `time.perf_counter` after which nobody wants the answer any more.
            thresholds: B - 1 of these images, as `Network.run`; None: none is to stop early.
            more_to_come: other images wait to be decoded, and take all CPUs until then.

        Raises:
            QueueFullError: too many images wait; nothing was spent on these.
            DeadlineError: the deadline passed; nothing was spent on images that still waited.
            InferenceError: the network failed.
        """

    def require_room(self, images: int = 1) -> None:
        """For those who would rather know before they decode so many images.

        Raises:
            QueueFullError: too many wait already.
        """

    @property
    def queued(self) -> int:
        """Images that wait now."""

    def close(self) -> None:
        """Finish what was accepted and free the threads; blocks.

        A reload needs none: an inference that nobody refers to any more ends by itself, after the last request.
        """
