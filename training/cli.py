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
        refusal = str(error)
    except OSError as error:  # a full disk, a folder that may not be written
        refusal = f"{error.filename}: {error.strerror}." if error.filename else f"{error}."
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        refusal = "out of memory; lower --batch-size, --image-size or --width."
    except KeyboardInterrupt:
        print("interrupted.", file=sys.stderr)
        sys.exit(INTERRUPTED)
    sys.exit(f"error: {' '.join(refusal.split())}")
