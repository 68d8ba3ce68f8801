"""Several serving processes behind one listener: the parent that keeps them, and `python -m app.workers`, one of them.

The parent binds the address, makes the folder that the workers share, and starts them as fresh interpreters (a fork
would copy locks that the threads of onnxruntime hold). It loads no model itself. A worker that dies is started again,
and so is one that cannot start; before all of them were ready once, that ends everything.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

from prometheus_client.multiprocess import mark_process_dead

from app.listener import turn_away
from app.logs import start_logging
from app.metrics import SHARED_FOLDER
from app.server import GRACE_S, serve
from app.settings import Settings, load_settings, variable
from model.contract import InterflowError

STABLE_S = 60
"""A worker that lived this long is started again with the shortest delay."""
SHORTEST_DELAY_S, LONGEST_DELAY_S = 0.5, 30.0
EXTRA_S = 5
"""What a worker may take to end beyond draining and grace, before it is killed."""

logger = logging.getLogger(__name__)


class WorkerError(InterflowError):
    """A worker that cannot start."""


def run_workers(settings: Settings, listener: socket.socket) -> int:
    """Serve with `settings.workers` processes until SIGTERM or SIGINT; gives the exit code: 0 if all of them drained.

    Raises:
        WorkerError: one could not start, before all of them were ready once.
    """
    shared = Path(tempfile.mkdtemp(prefix="interflow-"))  # for this user alone
    try:
        (shared / "metrics").mkdir()
        return 0 if asyncio.run(_Parent(settings, listener, shared).run()) else 1
    finally:
        shutil.rmtree(shared, ignore_errors=True)


class _Parent:
    def __init__(self, settings: Settings, listener: socket.socket, shared: Path) -> None:
        self._settings = settings
        self._listener = listener
        self._shared = shared
        self._running: set[asyncio.subprocess.Process] = set()
        self._serving: set[int] = set()
        """Numbers of the workers that are ready."""
        self._greeted = False
        """All of them have been, once."""
        self._ending = asyncio.Event()

    async def run(self) -> bool:
        """Until a signal; whether every worker then drained."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._end, number)
        keepers = [asyncio.create_task(self._keep(number)) for number in range(1, self._settings.workers + 1)]
        try:
            return all(await asyncio.gather(*keepers))
        finally:
            for keeper in keepers:  # of a start that failed; otherwise they have ended
                keeper.cancel()
            await asyncio.wait(keepers)
            self._kill()
            await asyncio.gather(*map(_ended, self._running))

    async def _keep(self, number: int) -> bool:
        """Run one worker, and another in its place when it dies, until the end; whether it drained then."""
        delay_s = SHORTEST_DELAY_S
        while not self._ending.is_set():
            born = time.monotonic()
            drained, cause = await self._run(number)
            if self._ending.is_set():
                if not drained:
                    logger.error("worker %d did not drain: %s.", number, cause)
                return drained
            if time.monotonic() - born > STABLE_S:
                delay_s = SHORTEST_DELAY_S
            logger.error("worker %d ended: %s. Another starts in %g s.", number, cause, delay_s)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), delay_s)
            delay_s = min(2 * delay_s, LONGEST_DELAY_S)
        return True

    async def _run(self, number: int) -> tuple[bool, str]:
        """Run one process until it ends; gives whether nothing was lost with it, and how it ended.

        Raises:
            WorkerError: it could not start, before all of them were ready once; later trouble may pass.
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "app.workers", str(self._listener.fileno())),
            stdin=asyncio.subprocess.PIPE,  # its end tells the worker that this process is gone
            stdout=asyncio.subprocess.PIPE,  # for the one line that says whether it is ready
            pass_fds=[self._listener.fileno()],
            env=os.environ
            | {
                variable("workers"): str(self._settings.workers),
                variable("state_dir"): str(self._settings.state_dir or self._shared),
                SHARED_FOLDER: str(self._shared / "metrics"),
            },
            start_new_session=True,  # Ctrl-C in a terminal reaches the parent alone, which tells the workers once
        )
        self._running.add(process)
        if self._ending.is_set():
            process.terminate()
        report = await process.stdout.readline() if process.stdout else b""
        word, _, text = report.decode().strip().partition(" ")
        if word == "ready":
            self._serving.add(number)
            self._greet(text)
        code = await _ended(process)
        self._running.discard(process)
        self._serving.discard(number)
        mark_process_dead(process.pid, str(self._shared / "metrics"))
        cause = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        if word != "ready" and not self._ending.is_set() and not self._greeted:
            raise WorkerError(text or f"worker {number} ended before it was ready ({cause}).")
        return code == 0 or word != "ready", text if word == "failed" else cause

    def _greet(self, text: str) -> None:
        if not self._greeted and len(self._serving) == self._settings.workers:
            self._greeted = True
            print(f"{text} ({self._settings.workers} workers)", flush=True)

    def _end(self, number: int) -> None:
        """First signal: every worker drains. Second: they, and this, end at once."""
        if self._ending.is_set():
            self._kill()
            shutil.rmtree(self._shared, ignore_errors=True)
            os._exit(128 + number)
        self._ending.set()
        for process in self._running:
            process.terminate()
        asyncio.get_running_loop().call_later(self._settings.drain_s, self._turn_away)
        asyncio.get_running_loop().call_later(self._settings.drain_s + GRACE_S + EXTRA_S, self._kill)

    def _turn_away(self) -> None:
        turn_away(self._listener)
        self._listener.close()  # the last worker that closes its own refuses connections; ours would let them wait

    def _kill(self) -> None:
        for process in self._running:
            with contextlib.suppress(ProcessLookupError):
                process.kill()


async def _ended(process: asyncio.subprocess.Process) -> int:
    """Its exit code, once it and its pipe have ended: one still open when the loop closes leaves a traceback behind."""
    if process.stdout:
        await process.stdout.read()
    return await process.wait()


def main() -> None:
    """One worker: its argument is the listener's file descriptor; one line to stdout says how the start went."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    try:
        settings = load_settings()
        start_logging(settings)
        serve(settings, socket.socket(fileno=int(sys.argv[1])), announce=_report)
    except InterflowError as error:
        print("failed", error)
        sys.exit(1)


def _report(greeting: str) -> None:
    print("ready", greeting, flush=True)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nobody reads the pipe any further


def _end_with_the_parent() -> None:
    os.read(sys.stdin.fileno(), 1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
