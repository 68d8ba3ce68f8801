"""`python -m app`: settings, listener, models, then the server; every failure on the way is one sentence and exit 1."""

import argparse
import errno
import logging
import signal
import socket
import sys

import uvicorn

from app.main import create_app
from app.repository import Repository, load_repository
from app.settings import Settings, load_settings, variable
from model.contract import InterflowError

BACKLOG = 2048
GRACE_S = 8
"""Time for accepted requests after SIGTERM; `docker stop` kills after 10 seconds."""


class ListenError(InterflowError):
    """The address cannot be listened on."""


def main() -> None:
    """Serve until SIGTERM or SIGINT, and exit with 0 then."""
    _argument_parser().parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        # also after a served signal: uvicorn restores this handler when it is done, and raises the signal again
        signal.signal(number, lambda *_: sys.exit(0))
    try:
        settings = load_settings()
        logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        listener = _bind(settings)
        repository = load_repository(settings)
        _listen(listener, settings)
    except InterflowError as error:
        sys.exit(f"error: {error}")
    print(_greeting(listener, repository), flush=True)
    config = uvicorn.Config(
        create_app(settings, repository),
        log_config=None,
        log_level=settings.log_level,
        ws="none",
        timeout_graceful_shutdown=GRACE_S,
    )
    uvicorn.Server(config).run(sockets=[listener])


def _argument_parser() -> argparse.ArgumentParser:
    rows = [
        (variable(name), "" if field.default is None else str(field.default), field.description)
        for name, field in Settings.model_fields.items()
    ]
    lines = [f"  {name:<25} {default:<10} {description}" for name, default, description in rows]
    return argparse.ArgumentParser(
        prog="python -m app",
        description="Serve the models under exports/ over HTTP. Settings are environment variables, with defaults:",
        epilog="\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _bind(settings: Settings) -> socket.socket:
    """Claim the address before the models load, which can take long; connections are refused until `_listen`."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # asyncio sets TCP_NODELAY only where the protocol is named; without it every answer takes 40 ms more
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:  # UnicodeError: a host name that no encoding of names can hold
        raise _listen_error(settings, error) from error
    return listener


def _listen(listener: socket.socket, settings: Settings) -> None:
    try:
        listener.listen(BACKLOG)
    except OSError as error:  # a second server may have bound the address, too, and listened first
        raise _listen_error(settings, error) from error


def _listen_error(settings: Settings, error: OSError | UnicodeError) -> ListenError:
    advice = {
        errno.EADDRINUSE: "Stop the other server, or set INTERFLOW_PORT",
        errno.EACCES: "Set INTERFLOW_PORT to 1024 or above",
    }.get(getattr(error, "errno", None) or 0, "Set INTERFLOW_HOST to an address of this machine")
    reason = (getattr(error, "strerror", None) or str(error)).lower()
    return ListenError(f"cannot listen on {settings.host} port {settings.port}: {reason}. {advice}.")


def _greeting(listener: socket.socket, repository: Repository) -> str:
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    model = repository.default
    return (
        f"serving {model.card.name} version {model.card.version} ({model.card.method.name}, "
        f"{len(model.card.classes)} classes, {model.runtime.provider}) on {address}; documentation: {address}/docs"
    )


if __name__ == "__main__":
    main()
