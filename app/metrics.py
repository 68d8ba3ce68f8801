"""Prometheus metrics of this process: load and times, and what each stage of the networks said.

Labels are bounded: routes are templates, never paths; models and stages are those that were loaded. With several
workers, prometheus-client keeps the numbers in files of the folder PROMETHEUS_MULTIPROC_DIR, which `python -m app`
makes, and whichever worker is asked gives the sum.
"""

import asyncio
import os
from functools import cache
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector

from app import cuda
from app.errors import DeviceLostError, DeviceMemoryError, InferenceError
from app.schemas import Interpretation

if TYPE_CHECKING:  # the repository tells this of its batches
    from app.repository import Repository

SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""prometheus-client's variable; it counts only where it is set before that library is imported."""
SAMPLE_S = 1.0
"""How old another worker's gauges may be."""

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_CONFIDENCES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"})

REQUESTS = Counter("interflow_requests", "Requests answered.", ["method", "route", "code"])
REQUEST_SECONDS = Histogram(
    "interflow_request_seconds", "From a request's head to the end of its answer.", ["route"], buckets=_SECONDS
)
IN_FLIGHT = Gauge("interflow_requests_in_flight", "Requests that are being handled.", multiprocess_mode="livesum")
STEP_SECONDS = Histogram(
    "interflow_step_seconds",
    "Parts of a request that was answered: decode, queue, inference, interpret, draw.",
    ["model", "step"],
    buckets=_SECONDS,
)
BATCH_IMAGES = Histogram("interflow_batch_images", "Images in a batch that a network ran.", ["model"], buckets=_IMAGES)
BATCH_SECONDS = Histogram("interflow_batch_seconds", "A network's run of one batch.", ["model"], buckets=_SECONDS)
FAILED_BATCHES = Counter(
    "interflow_failed_batches",
    "Batches that a network could not run; reason: device_lost, device_out_of_memory or other.",
    ["model", "reason"],
)
DEVICE_LOST = Gauge("interflow_device_lost", "Workers that lost their GPU.", multiprocess_mode="livesum")
QUEUE_IMAGES = Gauge(
    "interflow_queue_images", "Images that wait for a network.", ["model"], multiprocess_mode="livesum"
)
MODEL_LOADED = Gauge(
    "interflow_model_loaded", "Workers that have the version loaded.", ["model", "version"], multiprocess_mode="livesum"
)
MODEL_FALLBACK = Gauge(
    "interflow_model_fallback",
    "Workers that run the version on the CPU because CUDA could not be had; /readyz says why.",
    ["model", "version"],
    multiprocess_mode="livesum",
)
ANSWER_CONFIDENCE = Histogram(
    "interflow_answer_confidence", "Confidence of the fused answer.", ["model"], buckets=_CONFIDENCES
)
SHALLOW_DISAGREEMENTS = Counter(
    "interflow_shallow_disagreements", "Answers that a stage before the last reads otherwise.", ["model"]
)
ADAPTIVE_ANSWERS = Counter(
    "interflow_adaptive_answers", "Answers of `mode=adaptive`, by the stage that gave them.", ["model", "stage"]
)
STAGE_CONFIDENCE = Histogram(
    "interflow_stage_confidence",
    "Confidence of a stage's reading; agrees: whether it reads the answer's class.",
    ["model", "stage", "agrees"],
    buckets=_CONFIDENCES,
)


def record_request(method: str, route: str, code: int, seconds: float) -> None:
    """One request was answered.

    Args:
        method: as the client sent it.
        route: its template.
        code: status.
        seconds: from head to end.
    """
    count, histogram = _of_request(method if method in _METHODS else "other", route, code)
    count.inc()
    histogram.observe(seconds)


def record_batch(model: str, images: int, seconds: float) -> None:
    """A network ran a batch; called by its thread."""
    sizes, times = _of_batch(model)
    sizes.observe(images)
    times.observe(seconds)


def record_failed_batch(model: str, error: InferenceError) -> None:
    """A network could not run a batch."""
    reasons = {DeviceLostError: "device_lost", DeviceMemoryError: "device_out_of_memory"}
    FAILED_BATCHES.labels(model, reasons.get(type(error), "other")).inc()


def record_steps(model: str, **ms: float) -> None:
    """One request's time went so, in milliseconds: `decode`, `queue`, `inference`, `interpret`, those that it had."""
    for step, value in ms.items():
        _of_step(model, step).observe(value / 1e3)


def record_answer(model: str, said: Interpretation) -> None:
    """One image was answered, and the stages that were evaluated said this."""
    confidence, disagreements = _of_answer(model)
    confidence.observe(said["prediction"]["confidence"])
    agreed = []
    for stage in said["stages"]:
        prediction, agrees = stage["prediction"], stage["agrees"]
        if prediction is not None and agrees is not None:  # it was evaluated
            agreed.append(agrees)
            _of_stage(model, stage["name"], agrees).observe(prediction["confidence"])
    if not all(agreed[:-1]):
        disagreements.inc()
    if "exit" in said:
        stop = said["exit"]
        _of_exit(model, said["stages"][-1]["name"] if stop is None else stop["stage"]).inc()


# Children by their labels: looking one up in prometheus-client takes longer than counting does.
@cache
def _of_request(method: str, route: str, code: int) -> tuple[Counter, Histogram]:
    return REQUESTS.labels(method, route, str(code)), REQUEST_SECONDS.labels(route)


@cache
def _of_batch(model: str) -> tuple[Histogram, Histogram]:
    return BATCH_IMAGES.labels(model), BATCH_SECONDS.labels(model)


@cache
def _of_step(model: str, step: str) -> Histogram:
    return STEP_SECONDS.labels(model, step)


@cache
def _of_answer(model: str) -> tuple[Histogram, Counter]:
    return ANSWER_CONFIDENCE.labels(model), SHALLOW_DISAGREEMENTS.labels(model)


@cache
def _of_exit(model: str, stage: str) -> Counter:
    return ADAPTIVE_ANSWERS.labels(model, stage)


@cache
def _of_stage(model: str, stage: str, agrees: bool) -> Histogram:
    return STAGE_CONFIDENCE.labels(model, stage, str(agrees).lower())


class Gauges:
    """What is true at a moment rather than counted: written down when somebody reads the metrics."""

    def __init__(self) -> None:
        self.in_flight = 0
        """Requests that are being handled."""
        self._seen: set[tuple[str, str]] = set()

    def sample(self, repository: "Repository") -> None:
        """Write down how it is now."""
        IN_FLIGHT.set(self.in_flight)
        DEVICE_LOST.set(cuda.device.lost is not None)
        models = repository.models
        loaded = {(model.card.name, model.card.version) for model in models}
        queued = dict.fromkeys((name for name, _ in loaded | self._seen), 0)
        for model in models:
            queued[model.card.name] += model.inference.queued
        for name, images in queued.items():
            QUEUE_IMAGES.labels(name).set(images)
        fallen_back = {(model.card.name, model.card.version) for model in models if model.runtime.fallback is not None}
        # an unloaded one stays, as 0: the files of several workers forget nothing
        for version in loaded | self._seen:
            MODEL_LOADED.labels(*version).set(version in loaded)
            MODEL_FALLBACK.labels(*version).set(version in fallen_back)
        self._seen |= loaded

    async def keep_sampling(self, repository: "Repository") -> None:
        """For workers that another one may be asked about: until cancelled."""
        while True:
            self.sample(repository)
            await asyncio.sleep(SAMPLE_S)


def shared() -> bool:
    """Several workers count together."""
    return SHARED_FOLDER in os.environ


def exposition(accept: str) -> tuple[bytes, str]:
    """All metrics as text, and its media type, by the reader's Accept header; blocks for some milliseconds."""
    if shared():
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
    else:
        registry = REGISTRY
    encode, media_type = choose_encoder(accept)
    return encode(registry), media_type
