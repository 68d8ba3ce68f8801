"""The README is a promise: its commands run as they stand, in a copy of the project, as a new user's would."""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from training.recipe import add_recipe_options, resolve_recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEST_COMMAND = "pip install uv && uv run --extra train pytest"
BLOCKS = re.findall(r"^```sh\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_ci_runs_the_readmes_own_test_command():
    assert TEST_COMMAND in [line.strip() for block in BLOCKS for line in block.splitlines()]
    assert TEST_COMMAND in (ROOT / ".ci" / "run").read_text().splitlines()


def test_every_setting_is_in_the_readme_with_its_default():
    from app.settings import Settings, variable

    rows = dict(re.findall(r"^\| `(INTERFLOW_\w+)` \| (.*?) \|", README, re.MULTILINE))
    expected = {}
    for name, field in Settings.model_fields.items():
        expected[variable(name)] = "" if field.default is None else f"`{field.default}`"
    assert rows == expected


def test_the_answer_shown_has_the_fields_that_are_served():
    from app.schemas import Answer

    (shown,) = re.findall(r"^```json\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    answer = TypeAdapter(Answer).validate_json(shown)
    assert set(json.loads(shown)) == set(answer)
    card = json.loads((ROOT / "exports" / "cifar10" / "1" / "model.json").read_text())
    assert answer["model"].sha256 == card["provenance"]["weights_sha256"]
    assert answer["prediction"]["label"] == "cat"
    assert f"{sum(stage['contribution'] for stage in answer['stages']):.3f}" in README


def test_every_training_command_shown_is_one_that_train_takes():
    commands = re.findall(r"python training/train\.py( --(?!help)[^`\n]*)", README)
    assert len(commands) >= 3
    for command in commands:
        parser = argparse.ArgumentParser()
        parser.add_argument("--recipe")
        parser.add_argument("--out")
        add_recipe_options(parser)
        options = vars(parser.parse_args(shlex.split(command)))
        options.pop("out")
        assert resolve_recipe(options.pop("recipe"), options)


def test_links_and_pictures_lead_somewhere():
    targets = [t for t in re.findall(r"\]\(([^)#]+)\)", README) if not t.startswith("http")]
    assert targets
    assert [t for t in targets if not (ROOT / t).exists()] == []


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A copy of the project as git has it, without environment, runs or other exports."""
    copy = tmp_path_factory.mktemp("fresh") / "interflow"
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_command_runs_as_it_stands(fresh):
    shell = Shell(fresh)
    try:
        for block in BLOCKS:
            for line in block.splitlines():
                if line != TEST_COMMAND:  # which is what runs just now
                    shell.run(line)
    finally:
        shell.stop_server()
    answers = [json.loads(text) for text in shell.outputs if text.startswith('{"request_id"')]
    found = [(answer["prediction"]["label"], answer["model"]["name"], answer["model"]["version"]) for answer in answers]
    # bundled, then trained anew, then bundled and adaptive
    assert found == [("cat", "cifar10", "1"), ("7", "digits", "2"), ("cat", "cifar10", "1")]
    trained = json.loads((fresh / "exports" / "digits" / "2" / "model.json").read_text())
    assert trained["metrics"]["accuracy"] >= 0.97
    scored = json.loads((fresh / "scores" / "run.json").read_text())
    assert scored["done"]["predictions"] == len(list((fresh / "app" / "static" / "examples").iterdir()))


class Shell:
    """A user's terminal, and another one for the server."""

    def __init__(self, folder):
        self.folder = folder
        self.outputs = []
        self.server = None
        self.activate = ""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = str(free.getsockname()[1])
        mine = str(Path(sys.executable).parent)
        path = os.pathsep.join(part for part in os.environ["PATH"].split(os.pathsep) if part != mine)
        ours = ("VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT")
        kept = {name: value for name, value in os.environ.items() if name not in ours}
        self.environment = kept | {"PATH": path, "INTERFLOW_PORT": self.port}

    def run(self, line):
        """One line of the README, but for the port."""
        if "activate" in line:
            self.activate = f"{line} && "
        command = ["bash", "-c", self.activate + line.replace("localhost:8000", f"localhost:{self.port}")]
        if line.endswith("python -m app"):
            self.stop_server()  # a restart
            self.server = subprocess.Popen(command, cwd=self.folder, env=self.environment, start_new_session=True)
            self.wait_until_ready()
        else:
            done = subprocess.run(
                command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
            self.outputs.append(done.stdout)

    def wait_until_ready(self):
        for _ in range(1200):
            assert self.server.poll() is None, "the server ended"
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=5) as answer:
                    assert answer.status == 200
                    return
            except OSError:
                time.sleep(0.5)
        raise AssertionError("the server is not ready after ten minutes")

    def stop_server(self):
        if self.server:
            os.killpg(self.server.pid, signal.SIGTERM)  # uv, bash and the server under them
            self.server.wait(30)
