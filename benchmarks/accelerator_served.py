"""This server under load, on a GPU: what it answers in a second, and where the time of an answer goes."""

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from app.cpus import usable_cpus
from benchmarks.accelerator_models import photographs
from benchmarks.load import Load, load
from benchmarks.material import read_card, tensor_request
from benchmarks.servers import Running, family, free_port, ours, running
from benchmarks.wrk import BOUNDARY
from model.contract import InterflowError

CONNECTIONS_A_PROCESS = 8
PICTURES = 16
STEPS = re.compile(r'^interflow_step_seconds_(sum|count)\{model="[^"]*",step="(\w+)"\} (\S+)$', re.MULTILINE)
BATCHES = re.compile(r"^interflow_batch_images_(sum|count)\{[^}]*\} (\S+)$", re.MULTILINE)

Row = dict[str, Any]


def tensors(folder: Path, settings: Mapping[str, object], workers: int, batch: int, seconds: float) -> Row:
    """Batches of binary tensors, for the fused logits alone."""
    card = read_card(folder)
    body, json_bytes = tensor_request(photographs(card.input, PICTURES)[1], batch)
    headers = ["Content-Type: application/octet-stream", f"Inference-Header-Content-Length: {json_bytes}"]
    waiting = batch * _connections(workers)  # all that are asked at a time may wait
    with _serving(folder, settings, workers=workers, max_batch=batch, max_queue=waiting) as server:
        ask = partial(load, server.port, f"/v2/models/{card.name}/infer", [body], headers=headers)
        row = _under_load(server, ask, workers, seconds)
        return row | {"per_second": batch * row["per_second"]}  # images


def images(folder: Path, settings: Mapping[str, object], workers: int, seconds: float) -> Row:
    """Single JPEGs of the network's size, as multipart forms."""
    card = read_card(folder)
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n'.encode()
    tail = f"\r\n--{BOUNDARY}--\r\n".encode()
    bodies = [head + jpeg + tail for jpeg in photographs(card.input, PICTURES)[0]]
    headers = [f"Content-Type: multipart/form-data; boundary={BOUNDARY}"]
    with _serving(folder, settings, workers=workers) as server:
        return _under_load(server, partial(load, server.port, "/predict", bodies, headers=headers), workers, seconds)


@contextmanager
def _serving(folder: Path, settings: Mapping[str, object], **more: object) -> Iterator[Running]:
    """This server, as documented, of one model version alone."""
    with tempfile.TemporaryDirectory(prefix="interflow-benchmark-") as temporary:
        exports = Path(temporary) / "exports"
        (exports / folder.parent.name).mkdir(parents=True)
        (exports / folder.parent.name / folder.name).symlink_to(folder.resolve())
        log = Path(temporary) / "server.log"
        with running(*ours(exports, folder.parent.name, free_port(), log, dict(settings) | more)) as server:
            yield server


def _connections(workers: int) -> int:
    return CONNECTIONS_A_PROCESS * max(2, workers)


def _under_load(server: Running, ask: Callable[..., Load], workers: int, seconds: float) -> Row:
    """Rates, latencies, and what the server and the machine say of the time in between."""
    runtime = server.ask("GET", "/model")["runtime"]
    ask = partial(ask, processes=max(2, usable_cpus() // 4), connections=_connections(workers))
    ask(seconds=max(1.0, seconds / 2))
    before = _Looked.at(server)
    with _gpu_use() as use:
        found = ask(seconds=seconds)
    after = _Looked.at(server)
    if set(found.statuses) != {200} or found.lost:
        raise InterflowError(f"answers by status {found.statuses}, {found.lost} requests without one")
    return asdict(found) | after.since(before) | {"gpu_busy": use(), "graphs": (runtime["cuda"] or {}).get("graphs")}


@dataclass(frozen=True)
class _Looked:
    """A server at a moment: seconds and answers by step, batches and their images, and seconds of its processes."""

    moment: float
    cpu_s: float
    steps: dict[str, tuple[float, float]]
    batches: tuple[float, float]

    @classmethod
    def at(cls, server: Running) -> "_Looked":
        text = _metrics(server)
        steps: dict[str, dict[str, float]] = {}
        for kind, step, value in STEPS.findall(text):
            steps.setdefault(step, {})[kind] = float(value)
        batches = {kind: sum(float(v) for k, v in BATCHES.findall(text) if k == kind) for kind in ("sum", "count")}
        return cls(
            time.perf_counter(),
            sum(map(_cpu_seconds, family(server.process.pid))),
            {step: (found["sum"], found["count"]) for step, found in steps.items()},
            (batches["sum"], batches["count"]),
        )

    def since(self, before: "_Looked") -> Row:
        """Milliseconds an image of every step, images a batch, and the share of all CPUs that the server had.

        The load begins and ends between the two looks: the CPUs' share is the least that it was.
        """
        spent = {}
        for step, (total, count) in self.steps.items():
            total_before, count_before = before.steps.get(step, (0.0, 0.0))
            if count > count_before:
                spent[step] = 1e3 * (total - total_before) / (count - count_before)
        ran = self.batches[1] - before.batches[1]
        return {
            "step_ms": spent,
            "images_a_batch": (self.batches[0] - before.batches[0]) / ran if ran else None,
            "cpu_share": (self.cpu_s - before.cpu_s) / (self.moment - before.moment) / usable_cpus(),
        }


def _metrics(server: Running) -> str:
    import http.client  # noqa: PLC0415 - for this text alone; all else that is asked is JSON

    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it ended meanwhile
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def _gpu_use() -> Iterator[Any]:
    """Gives a function for the share of the time that the GPU was busy, in the block; None without nvidia-smi."""
    asked = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--loop-ms=200"]
    said = ""
    try:
        watcher = subprocess.Popen(asked, stdout=subprocess.PIPE, text=True)  # noqa: S603 - as above
    except FileNotFoundError:
        watcher = None
    try:
        yield lambda: float(np.mean([int(line) for line in said.split()])) / 100 if said.split() else None
    finally:
        if watcher is not None:
            watcher.terminate()
            said, _ = watcher.communicate()
