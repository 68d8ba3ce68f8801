"""`python -m app.bulk IN OUT`: every failure is one sentence and exit 1, a signal the sentence how to go on."""

import argparse
import signal
import sys
from types import FrameType

from app.logs import start_logging
from app.settings import Settings, load_settings
from model.contract import InterflowError
from model.images import FORMATS

EXTRA = ("fsspec", "pyarrow", "tqdm")


def main() -> None:
    """List, score, count; exits with 0 when all images are in OUT, readable or not."""
    options = _argument_parser().parse_args()
    asked_to_end: list[int] = []

    def interrupt(number: int, _: FrameType | None) -> None:
        for ignored in (signal.SIGINT, signal.SIGTERM):
            signal.signal(ignored, signal.SIG_IGN)  # the workers are being ended already
        asked_to_end.append(number)
        raise KeyboardInterrupt  # Ray, waiting in C++, makes a SystemError of any other

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        _run(options)
    except BaseException:
        if not asked_to_end:
            raise
        print("interrupted. The same command goes on where it was.", file=sys.stderr)
        sys.exit(128 + asked_to_end[0])  # whatever else was raised on the way out


def _run(options: argparse.Namespace) -> None:
    try:
        from app.bulk.run import run  # noqa: PLC0415 - what it takes is asked for below
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRA:
            raise
        sys.exit(
            f"error: python -m app.bulk takes {missing}, which is not installed. Install the extra `bulk` "
            "(uv sync --extra bulk)."
        )
    try:
        settings = load_settings()
        start_logging(settings)
        print(run(options, settings))
    except InterflowError as error:
        sys.exit(f"error: {error}")
    except OSError as error:  # a full disk, a folder that may not be read
        sys.exit(f"error: {error.filename}: {error.strerror}." if error.filename else f"error: {error}.")


def _argument_parser() -> argparse.ArgumentParser:
    limits = ", ".join(f"INTERFLOW_{name.upper()}" for name in Settings.model_fields if name in _OF_SETTINGS)
    parser = argparse.ArgumentParser(
        prog="python -m app.bulk",
        description=f"Answers to an archive of images ({', '.join(FORMATS)}), as Parquet. Begun again with the same "
        "command, it goes on where it was.",
        epilog=f"Of the server's settings, these count: {limits}.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "inputs",
        metavar="IN",
        nargs="+",
        help="a folder, a file, a pattern ('photos/**/*.jpg'), Parquet files, or addresses of them (s3://...)",
    )
    parser.add_argument("out", metavar="OUT", help="a folder or an address, empty or that of a run to go on with")
    parser.add_argument("--model", metavar="NAME", help="default: the server's")
    parser.add_argument("--version", metavar="N", help="default: the newest")
    parser.add_argument(
        "--column", metavar="NAME", help="of Parquet files: images as bytes or paths; found by itself if there is one"
    )
    parser.add_argument("--top-k", type=_positive, default=5, metavar="K", help="classes listed (default: 5)")
    parser.add_argument("--part-images", type=_positive, default=1024, metavar="N", help="in a file (default: 1024)")
    parser.add_argument(
        "--processes", type=_positive, metavar="N", help="default: one for each CPU, or up to 4 for each GPU"
    )
    parser.add_argument(
        "--threads", type=_natural, metavar="N",
        help="of each process, that fetch and decode beside it; default: 16 for remote images, 2 on a GPU, else none",
    )  # fmt: skip
    parser.add_argument(
        "--ray", nargs="?", const="", metavar="ADDRESS",
        help="on a Ray cluster: --ray=ADDRESS; without an address that of RAY_ADDRESS, or one started here",
    )  # fmt: skip
    parser.add_argument(
        "--gpus", type=float, default=0, metavar="G", help="of --ray: GPUs of a process, such as 0.25 (default: 0)"
    )
    return parser


_OF_SETTINGS = (
    "exports", "model", "provider", "cuda_graphs", "cuda_tf32", "cuda_memory", "max_bytes", "max_pixels", "max_batch",
    "log_level", "log_format",
)  # fmt: skip


def _positive(text: str) -> int:
    return _whole(text, 1)


def _natural(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from {least}")
    return int(text)


if __name__ == "__main__":
    main()
