"""`python -m app`: settings, listener, models, then the server; every failure on the way is one sentence and exit 1."""

import argparse
import os
import signal
import sys

from app.listener import bind
from app.logs import start_logging
from app.server import serve
from app.settings import Settings, load_settings, variable
from app.workers import run_workers
from model.contract import InterflowError


def main() -> None:
    """Serve until SIGTERM or SIGINT, and exit with 0 then."""
    for option, value in vars(_argument_parser().parse_args()).items():
        if value is not None:
            os.environ[variable(option)] = value
    for number in (signal.SIGINT, signal.SIGTERM):
        # while it starts, and after it served: uvicorn restores this handler when it is done
        signal.signal(number, lambda *_: sys.exit(0))
    try:
        settings = load_settings()
        start_logging(settings)
        listener = bind(settings)
        if settings.workers == 1:
            serve(settings, listener, announce=lambda greeting: print(greeting, flush=True))
        else:
            sys.exit(run_workers(settings, listener))
    except InterflowError as error:
        sys.exit(f"error: {error}")


def _argument_parser() -> argparse.ArgumentParser:
    rows = [
        (variable(name), "" if field.default is None else str(field.default), field.description)
        for name, field in Settings.model_fields.items()
    ]
    lines = [f"  {name:<25} {default:<10} {description}" for name, default, description in rows]
    parser = argparse.ArgumentParser(
        prog="python -m app",
        description="Serve the models under exports/ over HTTP. Settings are environment variables, with defaults:",
        epilog="\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--workers", metavar="N", help="as INTERFLOW_WORKERS, which it overrides")
    parser.add_argument("--root-path", metavar="PATH", help="as INTERFLOW_ROOT_PATH, which it overrides")
    return parser


if __name__ == "__main__":
    main()
