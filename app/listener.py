"""The socket that the server listens on: claimed before anything that takes long, closed with an empty queue."""

import contextlib
import ctypes
import errno
import socket
import struct
import sys

from app.settings import Settings
from model.contract import InterflowError

BACKLOG = 2048
SO_ATTACH_FILTER = 26
"""Linux's number, which Python does not name."""
NO_SYN = ((0x30, 0, 0, 13), (0x45, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF))
"""Classic BPF: load the TCP header's flags; where SYN is among them, keep 0 bytes of the packet, else all of it."""


class ListenError(InterflowError):
    """The address cannot be listened on."""


def bind(settings: Settings) -> socket.socket:
    """Claim the address before the models load, which can take long; connections are refused until `listen`.

    Raises:
        ListenError: it cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # asyncio sets TCP_NODELAY only where the protocol is named (uvloop always does); without it every answer
        # takes 40 ms more
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:  # UnicodeError: a host name that no encoding of names can hold
        raise _listen_error(settings, error) from error
    return listener


def listen(listener: socket.socket, settings: Settings) -> None:
    """Take connections from now on; several workers may say so of one socket.

    Raises:
        ListenError: a second server bound the address, too, and listened first.
    """
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        raise _listen_error(settings, error) from error


def turn_away(listener: socket.socket) -> None:
    """Let no new connection begin, while those that have begun can still be taken.

    Whatever is in a listener's queue when it closes is reset, though the client was told that it is connected. So it
    is emptied first, which ends only if nothing more comes in: the kernel drops packets that open a connection, and a
    client's kernel tries again after a second, when the address is closed or another server's. Linux only; where a
    sandbox has no such filter, who connects in the very moment of the end may be reset.
    """
    if sys.platform == "linux":
        program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in NO_SYN))
        described = struct.pack("HP", len(NO_SYN), ctypes.addressof(program))
        with contextlib.suppress(OSError):
            listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, described)


def url(listener: socket.socket) -> str:
    """Where it can be reached."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _listen_error(settings: Settings, error: OSError | UnicodeError) -> ListenError:
    advice = {
        errno.EADDRINUSE: "Stop the other server, or set INTERFLOW_PORT",
        errno.EACCES: "Set INTERFLOW_PORT to 1024 or above",
    }.get(getattr(error, "errno", None) or 0, "Set INTERFLOW_HOST to an address of this machine")
    reason = (getattr(error, "strerror", None) or str(error)).lower()
    return ListenError(f"cannot listen on {settings.host} port {settings.port}: {reason}. {advice}.")
