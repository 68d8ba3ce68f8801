"""What the entry points share: how a refusal or an interruption ends the process."""

import sys
from collections.abc import Callable

from model.contract import InterflowError

INTERRUPTED = 130
"""Exit status of a process stopped by Ctrl-C, by convention."""


def run(main: Callable[[], int | None]) -> None:
    """Call `main` and exit with its status; refusals become one line on stderr and status 1, without a traceback."""
    try:
        sys.exit(main() or 0)
    except InterflowError as error:
        sys.exit(f"error: {error}")
    except OSError as error:  # a full disk, a folder that may not be written
        place = f"{error.filename}: " if error.filename else ""
        sys.exit(f"error: {place}{error.strerror or error}.")
    except KeyboardInterrupt:
        print("interrupted.", file=sys.stderr)
        sys.exit(INTERRUPTED)
