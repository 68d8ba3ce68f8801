"""An artefact in onnxruntime: opened, compared with its card, and warmed up with everything that the card promises."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from app import cuda, memory
from app.cpus import be_nice, own_cpus, usable_cpus
from app.cuda import CUDA, CudaNetwork
from app.early_exit import EarlyExit, stopped
from app.errors import InferenceError
from app.inference import Outputs
from app.metrics import record_failed_batch
from app.schemas import CudaRuntime, Runtime
from app.settings import Settings
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
from model.cpu import cpu_features
from model.cut import CutError, Segment, cut
from model.explain import contributions

CPU = "CPUExecutionProvider"
CPU_WARM_UP_BATCHES = (1, 2)
TOLERANCE = 1e-3
"""Of the identities at warm-up, relative to the largest summand: as far off as TF32, with ten bits of each factor."""

CPUS_OF_A_LANE = 4
"""More threads do little for one inference; more CPUs get more lanes, but no two lanes share fewer: on 2 CPUs, two took
smaller batches and each other's time, for a fifth fewer requests a second of 2 to 8 clients, and 6 % fewer of 32."""
BATCH_OF_A_CPU, BATCH_ON_CUDA = 16, 32
"""Images in the largest batch, by default. An image alone takes a CPU 1.42 ms, in 8 it takes 1.17, in 32 1.12."""
LARGE_IMAGE = 64 * 64
"""Pixels. Of inputs with more, half as many make a batch: what lies between a network's layers grows with both."""
ALONE_SPIN_US = "30"
"""Microseconds that threads of an inference that nobody waits beside burn their CPU between two operators. To sleep and
be woken takes as long, and a network has dozens: one client's requests are answered 20 % sooner. Where others share the
CPUs, it takes more from them than it gives."""
ALONE_BYTES = 64 * 1024 * 1024
"""Of a graph. In larger ones operators take so long that waking counts for nothing, and the weights, which each session
has of its own, would fill the memory twice."""
LANES_ON_CUDA = 2
"""One fills and empties its memory while the other is on the GPU."""

AGAIN = "Export the model again."

logger = logging.getLogger(__name__)


class ModelError(InterflowError):
    """An artefact that is missing, broken, at odds with its card, or that cannot run where it was told to."""


class Session:
    """A loaded model that passed its warm-up.

    Args:
        folder: `<exports>/<model>/<version>`.
        settings: provider, lanes, threads, and the largest batch.

    Raises:
        ModelError, CardError: one sentence that says what is wrong with the artefact, or why CUDA cannot be had.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.card = read_card(folder)
        path = folder / MODEL_FILE
        cpus = usable_cpus(settings.workers)
        lanes = settings.lanes or max(1, cpus // CPUS_OF_A_LANE)
        # an int8 network is done so soon that the event loop fills a CPU meanwhile; and one image is done sooner by one
        # thread than by two
        quick = self.card.precision == "int8"
        # all lanes share the session's own threads, which are one less than its number; a lane's thread works, too
        threads = settings.threads or max(1, cpus - lanes + (0 if quick else 1))
        self._session, fallback = _open(path, settings, threads)
        on_cuda = self._session.get_providers()[0] == CUDA
        if on_cuda:
            lanes, threads = settings.lanes or LANES_ON_CUDA, 1
        alone = settings.threads or (1 if quick else cpus)
        as_all = settings.spinning and alone == threads
        spins = not on_cuda and alone > 1 and not as_all and path.stat().st_size <= ALONE_BYTES
        own = own_cpus(settings.workers) if spins and settings.pinning else []
        alone_on = own[:alone] if len(own) >= alone else []
        open_alone = partial(_create, providers=[CPU], settings=settings, threads=alone, alone_on=alone_on)
        self._alone_session = open_alone(path) if spins else self._session
        of_a_cpu = BATCH_OF_A_CPU // (2 if self.card.input.height * self.card.input.width > LARGE_IMAGE else 1)
        max_batch = settings.max_batch or (BATCH_ON_CUDA if on_cuda else of_a_cpu * max(1, cpus // lanes))
        self.runtime = Runtime(
            provider="cuda" if on_cuda else "cpu",
            requested_provider=settings.provider,
            fallback=fallback,
            onnxruntime=onnxruntime.__version__,
            cpus=cpus,
            lanes=lanes,
            # the CPUs that the lanes leave to the event loop, for which there is little to do where full batches wait
            helpers=0 if on_cuda or settings.lanes or settings.threads else cpus - lanes - threads + 1,
            threads=threads,
            lone_threads=alone if spins else threads,
            pinned=bool(alone_on),
            niceness=0 if on_cuda else settings.niceness,
            spinning=settings.spinning,
            max_batch=max_batch,
            # on 2 CPUs 5 % more requests a second of 128 clients than with the small ones alone, and as many of 32
            small_batch=max_batch if on_cuda or settings.batch_wait_us else (max_batch + 1) // 2,
            batch_sizes=_doubling(max_batch) if on_cuda else None,
            batch_wait_us=settings.batch_wait_us,
            max_queue=settings.max_queue,
        )
        _check_metadata(self._session, self.card, path)
        _check_signature(self._session, self.card, path)
        self._on_cuda: CudaNetwork | None = None
        self._early_exit = self._alone_early_exit = None
        if on_cuda:
            self._on_cuda = self._open_network(path, settings)
        else:
            _warn_of_another_cpu(self.card)
            if self.card.exits:
                segments = _segments(path, self.card)
                open_beside = partial(_create, providers=[CPU], settings=settings, threads=threads)
                self._early_exit = EarlyExit(self.card, segments, open_beside)
                self._alone_early_exit = EarlyExit(self.card, segments, open_alone) if spins else self._early_exit
        self._warm_up(path)

    def run(
        self, images: np.ndarray, names: Sequence[str], thresholds: np.ndarray | None = None, *, alone: bool = False
    ) -> Outputs:
        """One forward pass; blocks. Any number of threads may call this at a time.

        Args:
            images: uint8 (N, H, W, C); on CUDA at most the largest of the runtime's `batch_sizes`.
            names: of the outputs to compute.
            thresholds: (N, B - 1), as `Network.run`; only where the card has `exits`, and then the outputs are those of
                `EarlyExit.run`, whatever the names.
            alone: as `Network.run`.

        Raises:
            InferenceError: onnxruntime failed; by its subclasses, the GPU's memory did not suffice, or it is lost.
        """
        if self._on_cuda is not None:
            return self._run_on_cuda(self._on_cuda, images, names, thresholds)
        try:
            if thresholds is not None:
                early_exit = self._alone_early_exit if alone else self._early_exit
                assert early_exit is not None, "the card has no exits"  # noqa: S101 - whoever asks knows the card
                return early_exit.run(images, thresholds)
            return _whole(self._alone_session if alone else self._session, names, images)
        except Exception as error:  # onnxruntime's errors share no base class
            failure = InferenceError(f"inference failed ({_first_line(error)}).")
            record_failed_batch(self.card.name, failure)
            raise failure from error

    def _run_on_cuda(
        self, network: CudaNetwork, images: np.ndarray, names: Sequence[str], thresholds: np.ndarray | None
    ) -> Outputs:
        try:
            cuda.device.require()
            if thresholds is None:
                return network.run(images, names)
            return stopped(self.card, network.run(images, [BRANCH_LOGITS])[BRANCH_LOGITS], thresholds)
        except Exception as error:  # as in `run`
            failure = cuda.device.failure(error)
            record_failed_batch(self.card.name, failure)
            raise failure from error

    def _open_network(self, path: Path, settings: Settings) -> CudaNetwork:
        """The session bound to memory of the GPU, its graphs captured; without them, where `auto` cannot have them."""
        runtime = self.runtime
        try:
            network = CudaNetwork(self._session, self.card, runtime.batch_sizes or [], runtime.lanes)
            network.capture(settings.cuda_graphs)
        except Exception as error:  # onnxruntime's errors share no base class
            if settings.cuda_graphs != "auto" or cuda.device.lost:
                raise ModelError(f"{path}: fails on CUDA ({_first_line(error)}).") from error
            logger.warning("%s runs without CUDA graphs: %s.", path.parent, _first_line(error))
            without = settings.model_copy(update={"cuda_graphs": "off"})
            self._session, _ = _open(path, without, runtime.threads)
            return self._open_network(path, without)
        runtime.cuda = CudaRuntime(
            tf32=settings.cuda_tf32,
            graphs=sorted(network.graphs),
            memory=settings.cuda_memory // settings.workers or None,
        )
        return network

    def _warm_up(self, path: Path) -> None:
        spec = self.card.input
        names = list(self.card.outputs)
        noise = np.random.default_rng(0)
        for batch in self.runtime.batch_sizes or CPU_WARM_UP_BATCHES:
            images = noise.integers(0, 256, (batch, spec.height, spec.width, spec.channels), np.uint8)
            for run in self._ways(names):
                try:
                    values = run(images)
                except Exception as error:  # onnxruntime's errors share no base class
                    raise ModelError(f"{path}: fails on {batch} images ({_first_line(error)}). {AGAIN}") from error
                _check_values(values, self.card, batch, path)
            never = np.full((batch, len(self.card.stages) - 1), np.inf)
            for early_exit in {self._early_exit, self._alone_early_exit}:
                if early_exit is None:
                    continue
                try:
                    pieces = early_exit.run(images, never)
                except Exception as error:  # as above
                    raise ModelError(f"{path}: fails stage by stage ({_first_line(error)}). {AGAIN}") from error
                for name in (LOGITS, BRANCH_LOGITS, BRANCH_WEIGHTS):
                    otherwise = f"{path}: `{name}` stage by stage is not what the whole graph gives"
                    _require_equal(pieces[name], values[name], values[name], otherwise)

    def _ways(self, names: Sequence[str]) -> list[Callable[[np.ndarray], Outputs]]:
        """In which a batch may be run whole."""
        if (network := self._on_cuda) is not None:
            return [partial(network.run, names=names)]
        return [partial(_whole, session, names) for session in {self._session, self._alone_session}]


def _whole(session: onnxruntime.InferenceSession, names: Sequence[str], images: np.ndarray) -> Outputs:
    return dict(zip(names, session.run(names, {IMAGE: images}), strict=True))


def _warn_of_another_cpu(card: ModelCard) -> None:
    """Say where a model in fewer bits may answer otherwise than its card says: on a CPU that can do less."""
    known = card.against_float32.cpu if card.against_float32 else ()
    here = cpu_features()
    if missing := [name for name in known if name not in here]:
        logger.warning(
            "%s, version %s, is in %s and was measured on a CPU with %s, which this one has not: answers may differ a "
            "little from what its card says, and take longer.",
            card.name,
            card.version,
            card.precision,
            ", ".join(missing),
        )


def _segments(path: Path, card: ModelCard) -> list[Segment]:
    """The graph, cut behind the stages where some promise lets images stop."""
    limits = zip(*(policy.thresholds for policy in card.exits), strict=True)
    behind = [stage for stage, of_stage in enumerate(limits) if any(limit is not None for limit in of_stage)]
    try:
        return cut(onnx.load(path), len(card.stages), behind)
    except CutError as error:
        raise ModelError(f"{path}: cannot stop early, though its card says so: {error} {AGAIN}") from error


def read_card(folder: Path) -> ModelCard:
    """The card of `<exports>/<model>/<version>`, whose graph is there, too.

    Raises:
        ModelError, CardError: it is not, or the card is that of another model.
    """
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


def _doubling(most: int) -> list[int]:
    """1, 2, 4 ... up to and with `most`."""
    return [*(1 << power for power in range((most - 1).bit_length())), most]


def _open(path: Path, settings: Settings, threads: int) -> tuple[onnxruntime.InferenceSession, str | None]:
    """Returns the session, and why it is not on CUDA where `auto` would have had it there."""
    fallback = None
    if settings.provider != "cpu":
        session, fallback = cuda.open_session(lambda providers: _create(path, providers, settings, 1), settings)
        if session is not None:
            return session, None
        if settings.provider == "cuda":
            raise ModelError(
                f"INTERFLOW_PROVIDER is cuda, but {fallback}. Mend that, or set INTERFLOW_PROVIDER to auto or cpu."
            )
        logger.warning("%s runs on the CPU: %s.", path.parent, fallback)
    try:
        return _create(path, [CPU], settings, threads), fallback
    except Exception as error:  # onnxruntime's errors share no base class
        raise ModelError(f"{path}: not a readable ONNX model ({_first_line(error)}). {AGAIN}") from error


def _create(
    model: Path | bytes, providers: list, settings: Settings, threads: int, alone_on: Sequence[int] | None = None
) -> onnxruntime.InferenceSession:
    """A session of so many threads; `alone_on`: it is for inferences that are alone, on these CPUs, or where empty, on
    any."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    spins = settings.spinning or alone_on is not None
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spins)))
    if alone_on is not None and not settings.spinning:
        options.add_session_config_entry("session.intra_op.spin_duration_us", ALONE_SPIN_US)
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if alone_on:  # the thread that asks is the first, and goes where it is; onnxruntime counts from 1
        others = ";".join(str(cpu + 1) for cpu in alone_on[1:])
        options.add_session_config_entry("session.intra_op_thread_affinities", others)
    options.log_severity_level = 3  # errors; warnings tell of the graph's optimisation
    on_cpu = providers == [CPU]
    if on_cpu:
        _share_memory()
        options.add_session_config_entry("session.use_env_allocators", "1")
        # but not for weights, whose memory goes with their session
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    # threads are as nice as the one that starts them
    with ThreadPoolExecutor(1, initializer=be_nice, initargs=(settings.niceness if on_cpu else 0,)) as nice:
        return nice.submit(onnxruntime.InferenceSession, model, options, providers, enable_fallback=False).result()


@cache
def _share_memory() -> None:
    """Give all sessions of this process one pool of memory to compute in, and weights mappings of their own.

    Each session's own pool would lie in the malloc arenas of its threads and be freed at its end; and glibc keeps the
    top of a thread's arena, so that under load a server grew with its reloads, by a pool for every arena.
    """
    memory.map_large_blocks()
    pool = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    onnxruntime.create_and_register_allocator(pool, None)


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


def _check_values(values: Outputs, card: ModelCard, batch: int, path: Path) -> None:
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
