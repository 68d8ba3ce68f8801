"""An artefact in onnxruntime: opened, compared with its card, and warmed up with everything that the card promises."""

import contextlib
import ctypes
import io
import logging
from pathlib import Path

import numpy as np
import onnxruntime

from app.errors import InferenceError
from app.inference import Outputs
from app.schemas import Runtime
from app.settings import Settings, usable_cpus
from model.contract import (
    BRANCH_LOGITS,
    BRANCH_WEIGHTS,
    CARD_FILE,
    IMAGE,
    LAYER_ATTENTION,
    LOGITS,
    METADATA_KEY,
    MODEL_FILE,
    InterflowError,
    ModelCard,
    TensorSpec,
    branch_map_name,
)
from model.explain import contributions

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
WARM_UP_BATCHES = (1, 2)
TOLERANCE = 1e-3
"""Of the identities at warm-up, relative to the largest summand: CUDA multiplies in TF32."""

AGAIN = "Export the model again."

logger = logging.getLogger(__name__)


class ModelError(InterflowError):
    """An artefact that is missing, broken, at odds with its card, or that cannot run where it was told to."""


class Session:
    """A loaded model that passed its warm-up.

    Args:
        folder: `<exports>/<model>/<version>`.
        settings: provider and threads.

    Raises:
        ModelError, CardError: one sentence that says what is wrong with the artefact, or why CUDA cannot be had.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.card = _read_card(folder)
        path = folder / MODEL_FILE
        threads = settings.threads or usable_cpus()
        self._session, fallback = _open(path, settings.provider, threads)
        self.runtime = Runtime(
            provider="cuda" if self._session.get_providers()[0] == CUDA else "cpu",
            requested_provider=settings.provider,
            fallback=fallback,
            onnxruntime=onnxruntime.__version__,
            threads=threads,
        )
        _check_metadata(self._session, self.card, path)
        _check_signature(self._session, self.card, path)
        self._warm_up(path)

    def run(self, images: np.ndarray) -> Outputs:
        """One forward pass; blocks.

        Args:
            images: uint8 (N, H, W, C).

        Raises:
            InferenceError: onnxruntime failed.
        """
        names = [LOGITS, BRANCH_LOGITS, BRANCH_WEIGHTS]
        if self.card.layer_attention:
            names.append(LAYER_ATTENTION)
        try:
            return Outputs(*self._session.run(names, {IMAGE: images}))
        except Exception as error:  # onnxruntime's errors share no base class
            raise InferenceError(f"inference failed ({_first_line(error)}).") from error

    def _warm_up(self, path: Path) -> None:
        spec = self.card.input
        names = list(self.card.outputs)
        noise = np.random.default_rng(0)
        for batch in WARM_UP_BATCHES:
            images = noise.integers(0, 256, (batch, spec.height, spec.width, spec.channels), np.uint8)
            try:
                values = dict(zip(names, self._session.run(names, {IMAGE: images}), strict=True))
            except Exception as error:  # onnxruntime's errors share no base class
                raise ModelError(f"{path}: fails on {batch} images ({_first_line(error)}). {AGAIN}") from error
            _check_values(values, self.card, batch, path)


def _read_card(folder: Path) -> ModelCard:
    try:
        for name in (CARD_FILE, MODEL_FILE):
            if not (folder / name).is_file():
                raise ModelError(f"{folder}: {name} is missing; a version holds {MODEL_FILE} and {CARD_FILE}. {AGAIN}")
        text = (folder / CARD_FILE).read_bytes()
    except OSError as error:
        raise ModelError(f"{folder}: cannot be read ({error.strerror}).") from error
    card = ModelCard.from_json(text, folder / CARD_FILE)
    if (card.name, card.version) != (folder.parent.name, folder.name):
        raise ModelError(
            f"{folder}: the card is that of {card.name}, version {card.version}; the folders must bear these names."
        )
    return card


def _open(path: Path, provider: str, threads: int) -> tuple[onnxruntime.InferenceSession, str | None]:
    """Returns the session, and why it is not on CUDA where `auto` would have had it there."""
    fallback = None
    if provider != "cpu":
        session, fallback = _open_on_cuda(path, threads)
        if session is not None:
            return session, None
        if provider == "cuda":
            raise ModelError(
                f"INTERFLOW_PROVIDER is cuda, but {fallback}. Mend that, or set INTERFLOW_PROVIDER to auto or cpu."
            )
        logger.warning("%s runs on the CPU: %s.", path.parent, fallback)
    try:
        return _create(path, [CPU], threads), fallback
    except Exception as error:  # onnxruntime's errors share no base class
        raise ModelError(f"{path}: not a readable ONNX model ({_first_line(error)}). {AGAIN}") from error


def _open_on_cuda(path: Path, threads: int) -> tuple[onnxruntime.InferenceSession | None, str | None]:
    """Returns the session, or what stands against it."""
    if CUDA not in onnxruntime.get_available_providers():
        return None, "the installed onnxruntime has no CUDA (the package onnxruntime-gpu has)"
    try:
        ctypes.CDLL("libcuda.so.1")  # asked first: without a driver onnxruntime would print pages
    except OSError:
        return None, "there is no NVIDIA driver (libcuda.so.1 does not load)"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        onnxruntime.preload_dlls()
    try:
        session = _create(path, [(CUDA, {"cudnn_conv_algo_search": "HEURISTIC"}), CPU], threads)
    except Exception as error:  # onnxruntime's errors share no base class
        return None, f"CUDA cannot run it ({_first_line(error)})"
    if session.get_providers()[0] == CUDA:
        return session, None
    reason = printed.getvalue().partition("\n")[0] or "onnxruntime's message above says why"
    return None, f"CUDA does not start ({reason}; the extra `gpu` installs its libraries)"


def _create(path: Path, providers: list, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads must not burn shared CPUs
    options.log_severity_level = 3  # errors; warnings tell of the graph's optimisation
    return onnxruntime.InferenceSession(path, options, providers, enable_fallback=False)


def _check_metadata(session: onnxruntime.InferenceSession, card: ModelCard, path: Path) -> None:
    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    if text is None:
        raise ModelError(f"{path}: holds no metadata entry `{METADATA_KEY}`, so it is not one of our exports. {AGAIN}")
    inside = ModelCard.from_json(text, f"{path} (metadata)")
    for field in ModelCard.model_fields:
        if getattr(inside, field) != getattr(card, field):
            raise ModelError(f"{path}: the card inside differs from {CARD_FILE} in `{field}`. {AGAIN}")


def _check_signature(session: onnxruntime.InferenceSession, card: ModelCard, path: Path) -> None:
    for kind, nodes, promised in (
        ("input", session.get_inputs(), card.inputs),
        ("output", session.get_outputs(), card.outputs),
    ):
        found = {node.name: _spec(node) for node in nodes}
        for name in promised | found:
            ours, theirs = promised.get(name, "nothing"), found.get(name, "nothing")
            if ours != theirs:
                raise ModelError(f"{path}: {kind} `{name}` is {theirs}, but its card says {ours}. {AGAIN}")


def _spec(node: onnxruntime.NodeArg) -> TensorSpec:
    dtype = node.type.removeprefix("tensor(").removesuffix(")")
    return TensorSpec(
        "float32" if dtype == "float" else dtype, tuple(size if isinstance(size, int) else None for size in node.shape)
    )


def _check_values(values: dict[str, np.ndarray], card: ModelCard, batch: int, path: Path) -> None:
    """Hold one batch's outputs against the contract: shapes, finite numbers, both exact sums, layer attention."""
    for name, spec in card.outputs.items():
        if values[name].shape != (batch, *spec.shape[1:]):
            raise ModelError(f"{path}: `{name}` came as {values[name].shape} for a batch of {batch}, not as {spec}.")
        if not np.isfinite(values[name]).all():
            raise ModelError(f"{path}: `{name}` holds numbers that are not finite. {AGAIN}")
    summands = contributions(values[BRANCH_LOGITS], values[BRANCH_WEIGHTS])
    weights = np.broadcast_to(np.asarray(card.branch_weights, np.float32), summands.shape)
    _require_equal(values[BRANCH_WEIGHTS], weights, weights, f"{path}: `{BRANCH_WEIGHTS}` are not the card's")
    _require_equal(
        values[LOGITS], summands.sum(axis=1), summands, f"{path}: `{LOGITS}` are not the sum of the contributions"
    )
    for branch in range(len(card.stages)):
        maps, logits = values[branch_map_name(branch)], values[BRANCH_LOGITS][:, branch]
        _require_equal(
            maps.mean(axis=(2, 3)), logits, maps, f"{path}: `{branch_map_name(branch)}` does not average to its logits"
        )
    one = np.ones(1)
    for index, row in enumerate(card.layer_attention):
        of_row = f"{path}: `{LAYER_ATTENTION}` of {row.block}"
        weights, padding = np.split(values[LAYER_ATTENTION][:, index], [len(row.sources)], axis=1)
        _require_equal(weights, weights.clip(0, 1), one, f"{of_row} is not in 0..1")
        _require_equal(padding, np.zeros_like(padding), one, f"{of_row} is not zero beyond its sources")
        if row.kind == "share":
            _require_equal(weights.sum(axis=1), one, one, f"{of_row} does not sum to 1")


def _require_equal(got: np.ndarray, expected: np.ndarray, summands: np.ndarray, otherwise: str) -> None:
    difference, scale = np.abs(got - expected).max(initial=0), max(np.abs(summands).max(), 1e-6)
    if difference > TOLERANCE * scale:
        raise ModelError(f"{otherwise} (off by {difference:.3g}, at a scale of {scale:.3g}). {AGAIN}")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(". ")
