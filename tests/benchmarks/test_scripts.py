"""Every benchmark starts as its documentation says: as a script, from the project's root."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = [path for path in sorted(Path("benchmarks").glob("*.py")) if "__main__" in path.read_text()]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_starts(script):
    """Its own folder must not hide packages of the same name: `benchmarks/training.py` that of `training`."""
    run = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, timeout=300, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("usage: ")
