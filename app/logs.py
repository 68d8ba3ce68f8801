"""Log lines: for people (console) or programs (JSON), each with the id of the request that it was written for.

Lines hold ids, routes, codes and times; never an image, a header or a query.
"""

import json
import logging
import sys
import time
from contextvars import ContextVar

from app.settings import Settings

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Of the request that is being handled; empty outside of one."""

FIELDS = "fields"
"""What `extra` calls a dict of more fields for the JSON form; the message says the same in words."""


def start_logging(settings: Settings) -> None:
    """Write to stderr what the level lets through, in the settings' form."""
    # what no line of ours says need not be found out for every line (the library's own advice)
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else ConsoleFormatter())
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler])
    # what is wrong with a file or a form is told to whoever sent it
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)


class ConsoleFormatter(logging.Formatter):
    """`<time> <level> <logger>: <message> [<request id>]`, then a traceback where there is one."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802, the library's name
        """The line without its traceback."""
        line = super().formatMessage(record)
        request = request_id.get()
        return f"{line} [{request}]" if request else line


class JsonFormatter(logging.Formatter):
    """One object a line: time (UTC, RFC 3339), level, logger, message, request_id, and the record's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The whole line; a traceback is its field `exception`."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request := request_id.get():
            line["request_id"] = request
        line |= getattr(record, FIELDS, {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)
