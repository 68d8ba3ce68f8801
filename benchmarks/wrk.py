"""Load by wrk, with one thread: multipart images or any bodies to one address, and what came of it."""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from model.contract import InterflowError

SCRIPT = Path(__file__).with_suffix(".lua")
BOUNDARY = "----interflow-benchmark-7MA4YWxkTrZu0gW"
TIMEOUT_S = 60


@dataclass(frozen=True)
class Load:
    """What one run of wrk measured.

    Attributes:
        requests: that were answered, with whatever status.
        seconds: it took.
        p50_ms: median latency, of all answers.
        p99_ms: 99th percentile; wrk adds what a stalled connection kept it from asking (coordinated omission).
        refused: answers with a status of 400 and above.
        broken: connections that failed or were cut, and answers that did not come in time.
        statuses: answers by status, where they were counted.
    """

    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float
    refused: int
    broken: int
    statuses: dict[str, int]

    @property
    def per_second(self) -> float:
        """Good answers."""
        return (self.requests - self.refused) / self.seconds

    @property
    def errors(self) -> int:
        """Requests that had no good answer."""
        return self.refused + self.broken


def require_wrk() -> str:
    """Path of wrk.

    Raises:
        InterflowError: it is not installed.
    """
    found = shutil.which("wrk")
    if found is None:
        raise InterflowError("wrk is not installed; on Debian and Ubuntu: apt-get install wrk.")
    return found


def version() -> str:
    """Of wrk."""
    command = [require_wrk(), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()[1]  # noqa: S603 - made above


def multipart(file: Path, field: str) -> bytes:
    """A form with one image, as curl and browsers write it."""
    head = (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"; filename="{file.name}"\r\n'
        "Content-Type: image/jpeg\r\n\r\n"
    )
    return head.encode() + file.read_bytes() + f"\r\n--{BOUNDARY}--\r\n".encode()


def load_images(
    url: str, files: Sequence[Path], field: str, *, connections: int, seconds: int, pause_s: float = 0
) -> Load:
    """Post images as forms, in turn, over so many connections; `pause_s` lies between two requests of a connection."""
    bodies = [multipart(file, field) for file in files]
    headers = [f"Content-Type: multipart/form-data; boundary={BOUNDARY}"]
    return load(url, bodies, headers, connections=connections, seconds=seconds, pause_s=pause_s)


def load(
    url: str, bodies: Sequence[bytes], headers: Sequence[str], *, connections: int, seconds: int, pause_s: float = 0
) -> Load:
    """Post bodies.

    Raises:
        InterflowError: wrk failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for number, body in enumerate(bodies):
            paths.append(Path(folder) / str(number))
            paths[-1].write_bytes(body)
        command = [
            *(require_wrk(), "--threads", "1", "--connections", str(connections), "--duration", f"{seconds}s"),
            *("--timeout", f"{TIMEOUT_S}s", "--latency", "--script", str(SCRIPT), url),
            *("--", str(pause_s), *headers, "--", *map(str, paths)),
        ]
        out = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - made above
    if out.returncode:
        raise InterflowError(f"wrk failed: {(out.stderr or out.stdout).strip().splitlines()[-1]}")
    return parse(out.stdout)


def parse(output: str) -> Load:
    """Read wrk's output, as `wrk.lua` ends it.

    Raises:
        InterflowError: there is no such line.
    """
    lines = [line.removeprefix("RESULT ") for line in output.splitlines() if line.startswith("RESULT ")]
    if len(lines) != 1:
        raise InterflowError(f"wrk printed {len(lines)} lines that begin with RESULT; expected one.")
    return Load(**json.loads(lines[0]))
