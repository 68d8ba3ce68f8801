"""Local processes, each with a model of one thread, that take parts until there are none.

They are fresh interpreters, for a fork would copy locks that other threads hold. Each is told its parts over a pipe of
its own: a worker that dies can take no lock with it, and it is known which part it had.
"""

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from math import ceil
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import cast

import pyarrow as pa

from app.bulk.addresses import Output, is_remote
from app.bulk.listing import PARTS_A_FILE, listing_name
from app.bulk.plan import Counts, Plan
from app.bulk.scorer import Scorer
from app.cpus import usable_cpus
from app.settings import Settings
from model.contract import InterflowError

PATIENCE_S = 5
"""For a worker to end when it is told to, before it is killed."""
DEATHS = 2
"""Workers that a part may take with it."""
PROCESSES_OF_A_GPU = 4
"""By default: while one decodes, another's batch runs."""
FETCHERS, DECODERS = 16, 2
"""Threads of a process, by default, where images come from far away, and where CUDA computes."""

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class WorkerError(InterflowError):
    """A process that cannot work, or a part that ends every process that takes it."""


def visible_gpus(settings: Settings) -> list[str]:
    """CUDA's names of the devices that these settings allow and a driver shows."""
    if settings.provider == "cpu":
        return []
    count = ctypes.c_int(0)
    with contextlib.suppress(OSError):
        cuda = ctypes.CDLL("libcuda.so.1")
        if cuda.cuInit(0) == 0:
            cuda.cuDeviceGetCount(ctypes.byref(count))
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None or not count.value:  # the variable may be set where there is no GPU
        return [str(device) for device in range(count.value)]
    return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]


def default_processes(settings: Settings) -> int:
    """One for each CPU; with GPUs, no more than keep these busy."""
    gpus = len(visible_gpus(settings))
    return min(usable_cpus(), PROCESSES_OF_A_GPU * gpus) if gpus else usable_cpus()


def default_threads(plan: Plan, settings: Settings) -> int:
    """Threads of a process beside its own, which fetch and decode; where images are near and the CPU computes, none.

    There they would take turns on the same CPU: 1,480 us of CPU time an image without, 1,570 with one.
    """
    if any(is_remote(given) for given in plan.inputs):
        return FETCHERS
    return DECODERS if visible_gpus(settings) else 0


@dataclass(eq=False)
class _Worker:
    number: int
    process: BaseProcess
    pipe: Connection
    part: int | None = None
    """That it works on; None: it loads the model."""


def score_here(
    plan: Plan, output: Output, settings: Settings, processes: int, threads: int
) -> Generator[tuple[Counts, bool], None, None]:
    """Finish all parts of a plan: gives of each, as it is done, its counts and whether it had to be made.

    Args:
        plan: its listing is finished.
        output: where the listing is, and the tables go.
        settings: of the workers' sessions.
        processes: workers.
        threads: of each, as `Scorer`.

    Raises:
        WorkerError: a worker cannot start, or a part ended `DEATHS` workers.
        InterflowError: as `Scorer`.
    """
    assert plan.listed is not None, "the listing is finished"  # noqa: S101 - whoever asks listed it
    parts = iter(range(plan.listed.parts))
    orphans: list[int] = []
    deaths: Counter[int] = Counter()
    workers: dict[Connection, _Worker] = {}

    gpus = visible_gpus(settings)
    processes = min(processes, plan.listed.parts)
    own: dict[str, object] = {"workers": ceil(processes / len(gpus)) if gpus else 1}
    if settings.provider == "auto" and not gpus:
        own["provider"] = "cpu"  # or each worker would say why
    settings = settings.model_copy(update=own)

    def start(number: int) -> None:
        device = {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {}
        worker = _start(number, device | ONE_THREAD, plan, output, settings, threads)
        workers[worker.pipe] = worker

    try:
        for number in range(processes):
            start(number)
        while workers:
            pipe = cast(Connection, wait(list(workers))[0])
            worker = workers[pipe]
            try:
                message = pipe.recv()
            except (EOFError, OSError):
                del workers[pipe]
                part = _bury(worker)
                deaths[part] += 1
                if deaths[part] == DEATHS:
                    raise WorkerError(
                        f"part {part} (its images are in row group {part % PARTS_A_FILE} of "
                        f"{output.address}/{listing_name(part)}) ended {DEATHS} processes, the last by "
                        f"{_cause(worker)}. All other parts that were done are kept. If memory ran out, ask for fewer "
                        "processes; else find the image, take it away, and give the same command again."
                    ) from None
                orphans.append(part)
                start(worker.number)
                continue
            if isinstance(message, str):
                raise InterflowError(message)
            if message is not None:
                yield message
            worker.part = orphans.pop() if orphans else next(parts, None)
            if worker.part is None:
                del workers[pipe]
                pipe.close()
                worker.process.join()
            else:
                with contextlib.suppress(OSError):  # it died: its end of the pipe will say so
                    pipe.send(worker.part)
    finally:
        for worker in workers.values():
            worker.process.terminate()
        for worker in workers.values():
            worker.process.join(PATIENCE_S)
            worker.process.kill()


def _start(number: int, own: dict[str, str], *job: *tuple[Plan, Output, Settings, int]) -> _Worker:
    """A worker, with variables of its own."""
    spawning = multiprocessing.get_context("spawn")
    ours, theirs = spawning.Pipe()
    process = spawning.Process(target=_work, args=(theirs, *job), daemon=True)
    with _inherited(own):
        process.start()
    theirs.close()
    return _Worker(number, process, ours)


@contextlib.contextmanager
def _inherited(variables: dict[str, str]) -> Iterator[None]:
    """What a process has that is started meanwhile: variables, before its first import, and no ear for Ctrl-C, which in
    a terminal reaches all; this process ends the workers."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    blocking = hasattr(signal, "pthread_sigmask")
    if blocking:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        if blocking:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _bury(worker: _Worker) -> int:
    """Of a worker that died: the part that it had.

    Raises:
        WorkerError: it had none yet.
    """
    worker.process.join()
    if worker.part is None:
        raise WorkerError(
            f"a process ended before it had loaded the model ({_cause(worker)}). Ask for fewer processes."
        )
    print(f"a process ended by {_cause(worker)}; another takes part {worker.part}.", file=sys.stderr)
    return worker.part


def _cause(worker: _Worker) -> str:
    code = worker.process.exitcode or 0
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _work(pipe: Connection, plan: Plan, output: Output, settings: Settings, threads: int) -> None:
    """One worker: says that it is ready, then takes parts until the pipe is closed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    pa.set_cpu_count(1)
    try:
        scorer = Scorer(plan, output, settings, threads)
        gc.collect()
        gc.freeze()  # what is loaded stays: no collection need look through it again
        pipe.send(None)
        while True:
            pipe.send(scorer.finish(pipe.recv()))
    except InterflowError as error:
        pipe.send(str(error))
    except EOFError:
        pass


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
