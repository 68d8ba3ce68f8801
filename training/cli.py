"""What the entry points share: a type of options, and how a refusal or an interruption ends the process."""

import argparse
import sys
from collections.abc import Callable

from model.contract import InterflowError
from training import ranks

INTERRUPTED = 130
"""Exit status of a process stopped by Ctrl-C, by convention."""


def count(text: str) -> int:
    """A whole number from 1, as an option's type."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 or more")
    return int(text)


def whole_number(text: str) -> int:
    """A whole number from 0, as an option's type."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text}: expected 0 or more")
    return int(text)


def run(main: Callable[[], int | None], *, together: bool = False) -> None:
    """Call `main` and exit with its status; refusals become one line on stderr and status 1, without a traceback.

    Args:
        main: the command.
        together: whether several processes can do it, started by torchrun. Where they cannot, one says so.
    """
    if ranks.launched() > 1 and not together:
        sys.exit("error: torchrun is for training/train.py; start this with python." if ranks.first() else 0)
    try:
        sys.exit(main() or 0)
    except InterflowError as error:
        refusal = str(error)
    except OSError as error:  # a full disk, a folder that may not be written
        refusal = f"{error.filename}: {error.strerror}." if error.filename else f"{error}."
    except (MemoryError, RuntimeError) as error:
        if ranks.lost(error):
            refusal = ranks.OTHER_ENDED
        elif "memory" in str(error) or isinstance(error, MemoryError):
            refusal = "out of memory; lower --batch-size, --image-size or --width."
        else:
            raise
    except KeyboardInterrupt:
        if ranks.first():
            print("interrupted.", file=sys.stderr)
        sys.exit(INTERRUPTED)
    refusal = f"error: {' '.join(refusal.split())}"
    if ranks.several():
        ranks.fail(refusal)
    sys.exit(refusal)
