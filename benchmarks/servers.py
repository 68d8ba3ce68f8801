"""Servers to be measured: started in sessions of their own, waited for, and ended with all of their processes."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from app.settings import PREFIX, variable
from benchmarks.material import ROOT
from benchmarks.wrk import BOUNDARY, multipart
from model.contract import InterflowError

HOST = "127.0.0.1"
START_S = 120
END_S = 15
"""For a server to end after SIGTERM; then it is killed."""


class ServerError(InterflowError):
    """A server that does not start, or does not answer as it should."""


@dataclass(frozen=True)
class Running:
    """A server that is ready."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def url(self, path: str) -> str:
        """Where a path of it is."""
        return f"http://{HOST}:{self.port}{path}"

    def ask(self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None) -> Any:
        """One request; gives the answer's JSON, or None where it has no body.

        Raises:
            ServerError: a status other than 200.
        """
        status, text = ask(self.port, method, path, body, headers)
        if status != http.client.OK:
            raise ServerError(f"{method} {path} was answered with {status}: {text[:300].decode(errors='replace')}")
        return json.loads(text) if text else None

    def classify(self, path: str, file: Path, field: str) -> Any:
        """The answer to one image."""
        headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        return self.ask("POST", path, multipart(file, field), headers)

    def memory_bytes(self) -> int:
        """Resident bytes of all its processes together; pages that they share count in each."""
        return sum(map(_resident, family(self.process.pid)))


def ask(
    port: int, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> tuple[int, bytes]:
    """One request on a connection of its own: status and body."""
    connection = http.client.HTTPConnection(HOST, port, timeout=60)
    try:
        connection.request(method, path, body, dict(headers or {}))
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


@contextmanager
def running(
    command: Sequence[str], environment: Mapping[str, str], port: int, ready_path: str, log: Path
) -> Iterator[Running]:
    """Start a server, wait until it is ready, and end it with all of its processes in any case.

    Args:
        command: its command line.
        environment: added to this process' own, without its settings for this project's server.
        port: that it was told to listen on.
        ready_path: answers 200 when it is ready.
        log: file for what it prints.

    Raises:
        ServerError: it ended, or was not ready in time.
    """
    with log.open("wb") as out:
        process = subprocess.Popen(  # noqa: S603 - the benchmark's own command lines
            command,
            env={name: value for name, value in os.environ.items() if not name.startswith(PREFIX)} | dict(environment),
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the server
        )
    try:
        _wait(process, port, ready_path, log)
        yield Running(process, port, log)
    finally:
        end(process)


def ours(
    exports: Path, model: str, port: int, log: Path, settings: Mapping[str, object] | None = None
) -> tuple[list[str], dict[str, str], int, str, Path]:
    """What `running` takes to start this project's server, as documented; `settings` by their names in lower case."""
    given: dict[str, object] = {"host": HOST, "port": port, "exports": exports, "model": model, "log_level": "warning"}
    given |= settings or {}
    environment = {variable(name): str(value) for name, value in given.items()}
    return [sys.executable, "-m", "app"], environment, port, "/readyz", log


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def family(pid: int) -> list[int]:
    """A process and all that descend from it, by their ids."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                # after the command, which may hold anything, in brackets: state and parent
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError):  # it ended meanwhile
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for member in found:
        found.extend(children.get(member, []))
    return found


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to a server, and after a while SIGKILL to whatever is left of it and of its children."""
    handles = _handles(family(process.pid))
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            handles += _handles(family(process.pid))
            process.kill()
            process.wait()
    for handle in handles:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        os.close(handle)


def _handles(pids: Sequence[int]) -> list[int]:
    """File descriptors of processes: unlike a number, none ever means another process."""
    handles = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            handles.append(os.pidfd_open(pid))
    return handles


def _wait(process: subprocess.Popen[bytes], port: int, path: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerError(f"it ended with {process.returncode} before it was ready; its last words: {_tail(log)}")
        try:
            if ask(port, "GET", path)[0] == http.client.OK:
                return
        except (OSError, http.client.HTTPException):
            pass
        time.sleep(0.1)
    raise ServerError(f"it was not ready after {START_S} s; its last words: {_tail(log)}")


def _tail(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-3:])[-600:] or "none"


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):  # it ended meanwhile
        return 0


class MemorySampler:
    """Looks at a server's memory once a second, as long as its block lasts.

    Attributes:
        samples: seconds since the start, and bytes.
    """

    def __init__(self, server: Running) -> None:
        self.samples: list[tuple[float, int]] = []
        self._server = server
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        started = time.monotonic()
        while not self._done.wait(1):
            self.samples.append((time.monotonic() - started, self._server.memory_bytes()))


@contextmanager
def workspace() -> Iterator[Path]:
    """A temporary folder; SIGTERM ends the block as Ctrl-C does, so that no server outlives it."""

    def stop(number: int, _: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with tempfile.TemporaryDirectory(prefix="interflow-benchmark-") as folder:
            yield Path(folder)
    finally:
        signal.signal(signal.SIGTERM, before)
