"""One serving process: uvicorn with our end (draining), and with limits on clients that are slow to say what they want.

The end, on SIGTERM or SIGINT: /readyz answers 503 and every answer closes its connection, while new connections are
still taken for INTERFLOW_DRAIN_S; then they are turned away, what was accepted is answered, and the process is done. A
second signal ends it at once. A GPU that is lost ends it in the same way, but with status 1, where INTERFLOW_CUDA_LOST
says so: its context cannot be had again in the same process.
"""

import asyncio
import contextlib
import gc
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import httptools
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from app import cuda
from app.errors import ModelNotFoundError, NotReadyError
from app.listener import BACKLOG, listen, turn_away, url
from app.main import create_app
from app.repository import Repository, load_repository
from app.settings import Settings

GRACE_S = 8
"""Time for accepted requests after the listener closed; `docker stop` kills after 10 seconds in all."""
LAST_REQUESTS_S = (0.1, 1.0)
"""What a kept connection, and one that was just taken, may take to send a request once new ones are turned away."""
SWITCH_S = 0.001
"""How long the event loop may keep a lane from its next batch; Python's 5 ms are a quarter of one, in which CPUs idled.
128 clients had 2.5 % more answers a second."""
MAX_HEAD_BYTES = 64 * 1024
"""Of a request's line and headers, of a chunk's extensions and of the trailers; httptools itself has no limit."""

logger = logging.getLogger(__name__)


def serve(settings: Settings, listener: socket.socket, announce: Callable[[str], None]) -> None:
    """Load the models, listen, say so, and serve until a signal.

    Raises:
        InterflowError: one sentence, before anything is served.
    """
    repository = load_repository(settings)
    app = create_app(settings, repository)
    listen(listener, settings)
    greeting = _greeting(repository, url(listener) + settings.root_path)
    gc.collect()
    gc.freeze()  # what is loaded stays: walking all of it in every full collection took 5 % of the time
    gc.set_threshold(50_000, 20, 20)  # requests that wait are no garbage: with 1,000 of them, looking took 20 %
    sys.setswitchinterval(SWITCH_S)
    Server(app, settings, lambda: announce(greeting)).run(sockets=[listener])
    if cuda.device.lost and settings.cuda_lost == "exit":
        logger.critical("ended, because the GPU was lost (INTERFLOW_CUDA_LOST): to be started anew.")
        logging.shutdown()
        os._exit(1)  # Python's own end would free what lies on the GPU, which fails now, or hangs


def _greeting(repository: Repository, address: str) -> str:
    try:
        model = repository.default
    except (NotReadyError, ModelNotFoundError):  # it was unloaded by a request, which outlived the worker before
        served = "no default model"
    else:
        served = (
            f"{model.card.name} version {model.card.version} ({model.card.method.name}, "
            f"{len(model.card.classes)} classes, {model.runtime.provider})"
        )
    return f"serving {served} on {address}; documentation: {address}/docs"


class Server(uvicorn.Server):
    """Uvicorn's server, which drains before it ends and exits with 0.

    Args:
        app: to serve.
        settings: how long clients may take, and draining.
        announce: called once requests are answered, and a signal drains rather than kills.
    """

    def __init__(self, app: FastAPI, settings: Settings, announce: Callable[[], None] = lambda: None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=Protocol,
                ws="none",
                log_config=None,
                log_level=settings.log_level,
                server_header=False,
                backlog=BACKLOG,
                timeout_keep_alive=settings.keep_alive_s,
                timeout_graceful_shutdown=GRACE_S,
            )
        )
        self._app = app
        self._settings = settings
        self._announce = announce
        self._drained_at: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to answer, and say so."""
        await super().startup(sockets)
        self._announce()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain. Second: end at once, as one that was killed by it."""
        if self._drained_at is not None:
            os._exit(128 + sig)
        self._drain()

    def _drain(self) -> None:
        self._app.state.draining = True
        self._drained_at = time.monotonic() + self._settings.drain_s

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second; true ends the serving."""
        if counter % 10 == 0:
            self._close_the_slow()
        if cuda.device.lost and self._settings.cuda_lost == "exit" and self._drained_at is None:
            self._drain()
        return await super().on_tick(counter) or (self._drained_at is not None and time.monotonic() >= self._drained_at)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no new connections, let requests that are on their way come in, and answer what came."""
        for listener in sockets or []:
            if self._settings.workers == 1:
                turn_away(listener)  # else it is not ours alone, and the parent does so
        kept_s, taken_s = LAST_REQUESTS_S
        begun = time.monotonic()
        await asyncio.sleep(kept_s)
        waiting = [connection for listener in sockets or [] for connection in _taken(listener)]
        for server in self.servers:
            server.close()
        for connection in waiting:
            await asyncio.get_running_loop().connect_accepted_socket(self._protocol, connection)
        while time.monotonic() - begun < taken_s and any(one.cycle is None for one in self._connections()):
            await asyncio.sleep(0.01)
        await super().shutdown(sockets)

    def _connections(self) -> list["Protocol"]:
        return [one for one in self.server_state.connections if isinstance(one, Protocol)]

    def _protocol(self) -> "Protocol":
        return Protocol(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

    def _close_the_slow(self) -> None:
        idle_s = max(self._settings.keep_alive_s, self._settings.body_timeout_s)
        for connection in self._connections():
            connection.wake_after(self._settings.body_timeout_s)
            if connection.is_overdue(self._settings.body_timeout_s, idle_s):
                connection.end()


def _taken(listener: socket.socket) -> Iterator[socket.socket]:
    """Connections that the kernel holds for us; uvloop takes one a turn, and closing would reset the rest."""
    listener.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            yield listener.accept()[0]


class _OneWrite(asyncio.Transport):
    """Of one answer: its head leaves together with the first piece of its body.

    Uvicorn writes them apart, which made two packets of every answer, for two of the kernel's rounds here and at the
    reader's: 6 % of the event loop's time.
    """

    __slots__ = ("_head", "_transport")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head: bytes | None = None
        """None: not written yet. Empty: sent."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """The head, which waits; then pieces of the body, which do not."""
        if self._head is None:
            self._head = bytes(data)
        elif self._head:
            self._transport.writelines([self._head, data])
            self._head = b""
        else:
            self._transport.write(data)

    def close(self) -> None:
        """Send what waits, and end the connection."""
        if self._head:
            self._transport.write(self._head)
        self._transport.close()


class Protocol(HttpToolsProtocol):
    """Uvicorn's HTTP/1.1, which also knows how long it waits for its client, and limits what is no body.

    A request for another protocol (`Upgrade: h2c`, as Java's client sends first, or `websocket`) is taken as if it did
    not ask, as a server may (RFC 9110, 7.8). httptools stops behind such a head, so that it is read twice.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.access_log = False  # ours has the request's id, route and time
        self._waits_since = time.monotonic()
        self._unread_since: float | None = None
        """When an answer began to wait for its reader."""
        self._answering: RequestResponseCycle | None = None
        """The request whose turn it is; `cycle` is the last that came."""
        self._in_head = False
        self._framing_bytes = 0
        """That came since the last whole head or piece of a body."""

    def is_overdue(self, head_s: float, idle_s: float) -> bool:
        """No request is being handled, and none has come, or an answer was not read, for longer than it may take."""
        if self._unread_since is not None:
            return time.monotonic() - self._unread_since > idle_s
        if self.cycle is not None and not self.cycle.response_complete:
            return False
        return time.monotonic() - self._waits_since > (head_s if self._in_head else idle_s)

    def end(self) -> None:
        """Close the connection; one that would first send what nobody reads is cut off."""
        if self._unread_since is not None or self.transport.is_closing():
            self.transport.abort()
        else:
            self.transport.close()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        # a HEAD has no body to wait for, and to be told to continue is no answer
        if cycle.scope["method"] != "HEAD" and not cycle.waiting_for_100_continue:
            cycle.transport = _OneWrite(cycle.transport)
        super()._start_asgi_task(cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone, or was cut off; uvicorn says so only to the last of the requests that came together."""
        if self._answering is not None:
            self._answering.disconnected = True
            self._answering.message_event.set()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """More of an answer waits than the kernel takes."""
        self._unread_since = time.monotonic()
        super().pause_writing()

    def resume_writing(self) -> None:
        """The client has read nearly all of it."""
        self._unread_since = None
        super().resume_writing()

    def wake_after(self, body_s: float) -> None:
        """Hand an empty piece to a request that waits for its body for longer, so that it can give up."""
        cycle = self.cycle
        if cycle is not None and cycle.more_body and time.monotonic() - self._waits_since > body_s:
            cycle.message_event.set()

    def on_message_begin(self) -> None:
        """The first byte of a head came."""
        self._in_head = True
        self._waits_since = time.monotonic()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """A head is whole."""
        if self.parser.should_upgrade():
            return  # to be read again
        self._in_head = False
        self._framing_bytes = 0
        self._waits_since = time.monotonic()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of a body came."""
        self._framing_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A request is whole."""
        if self.parser.should_upgrade():
            return  # only its head is
        self._framing_bytes = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """An answer is out; the rest of a body that nobody read keeps the connection no longer than silence does."""
        self._waits_since = time.monotonic()
        super().on_response_complete()

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
        self._framing_bytes += len(data)
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except httptools.HttpParserError:
            reason = "Invalid HTTP request received."
            self.logger.warning(reason)
            self._refuse(reason)
        if self._framing_bytes > MAX_HEAD_BYTES:
            self._refuse(f"The request's line and headers, or its trailers, exceed {MAX_HEAD_BYTES} bytes.")

    def _parse(self, data: bytes | memoryview) -> None:
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                if self.parser.get_method() == b"CONNECT":
                    raise httptools.HttpParserError("no proxy") from upgrade
                (end_of_head,) = upgrade.args
                data = memoryview(data)[end_of_head:]
                head = self._head_without_upgrade()
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
                self.parser.feed_data(head)

    def _head_without_upgrade(self) -> bytes:
        line = b"%b %b HTTP/%b\r\n" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        kept = (b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade")
        return line + b"".join(kept) + b"\r\n"

    def _refuse(self, reason: str) -> None:
        if not self.transport.is_closing():
            self.send_400_response(reason)
