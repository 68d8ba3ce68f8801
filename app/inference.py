"""From pixels to branch outputs without blocking the event loop: the interface that routes use, and its direct form."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Outputs:
    """What the network gave for N images; B branches, K classes, L blocks of at most S sources, float32."""

    logits: np.ndarray
    """(N, K), fused."""
    branch_logits: np.ndarray
    """(N, B, K)."""
    branch_weights: np.ndarray
    """(N, B, K)."""
    layer_attention: np.ndarray | None = None
    """(N, L, S), rows as the card's; None where the network's layers have no attention of their own."""


@dataclass(frozen=True)
class Inferred:
    """Outputs, and the time they took in milliseconds."""

    outputs: Outputs
    queue_ms: float
    inference_ms: float


class Network(Protocol):
    """Blocking forward pass; `app.session.Session` is one."""

    def run(self, images: np.ndarray) -> Outputs:
        """uint8 (N, H, W, C) to outputs of N images."""


class Inference(Protocol):
    """How routes ask a network."""

    async def infer(self, images: np.ndarray) -> Inferred:
        """uint8 (N, H, W, C) to outputs of N images, in their order.

        Raises:
            InferenceError: the network failed.
        """

    def close(self) -> None:
        """Finish what was accepted and free the threads."""


class DirectInference:
    """One thread that runs one request after the other, as it came."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._thread = ThreadPoolExecutor(1, "inference")

    async def infer(self, images: np.ndarray) -> Inferred:
        """As `Inference.infer`; a request that is cancelled while it waits is never run."""
        asked = time.perf_counter()

        def work() -> Inferred:
            started = time.perf_counter()
            outputs = self._network.run(images)
            return Inferred(outputs, 1e3 * (started - asked), 1e3 * (time.perf_counter() - started))

        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def close(self) -> None:
        """As `Inference.close`."""
        self._thread.shutdown()
