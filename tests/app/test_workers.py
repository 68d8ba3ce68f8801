"""Several workers: one address, one sum of metrics, replaced when they die, and an end that is everybody's."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import httpx2
import pytest

IMAGE = Path("app/static/examples/digits-7.png").read_bytes()


@pytest.fixture
def workers(start, tmp_path, monkeypatch):
    """Starts so many workers; gives the parent and a function that asks each request on a connection of its own."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    started = []

    def run(number=2, **settings):
        process = start("--workers", str(number), **{"provider": "cpu", "drain_s": 0} | settings)
        started.append(process)
        greeting = process.stdout.readline()
        assert f"({number} workers)" in greeting
        address = greeting.split(" on ")[1].split(";")[0]

        def ask(method, path, **options):
            return httpx2.request(method, address + path, trust_env=False, timeout=60, **options)

        return process, ask

    yield run
    for process in started:
        process.kill()
        process.communicate(timeout=60)


def children(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def finish(process):
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


def value(text, name):
    return sum(float(number) for number in re.findall(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE))


def test_any_worker_gives_the_metrics_of_all(workers):
    process, ask = workers()
    for _ in range(20):
        assert ask("POST", "/predict", content=IMAGE).status_code == 200
    text = ask("GET", "/metrics").text
    assert value(text, 'interflow_requests_total{code="200",method="POST",route="/predict"}') == 20
    assert value(text, 'interflow_answer_confidence_count{model="digits"}') == 20
    assert value(text, 'interflow_model_loaded{model="digits",version="1"}') == 2
    process.terminate()
    code, _, errors = finish(process)
    assert code == 0, errors


def test_each_has_its_share_of_the_cpus(workers, start):
    from app.cpus import usable_cpus

    _, ask = workers()
    assert ask("GET", "/model").json()["runtime"]["cpus"] == usable_cpus(2)


def test_a_worker_that_dies_is_replaced_and_what_it_counted_stays(workers, tmp_path):
    process, ask = workers()
    counted = 'interflow_requests_total{code="200",method="GET",route="/model"}'
    for _ in range(10):
        ask("GET", "/model")
    while value(ask("GET", "/metrics").text, counted) < 10:  # a request is counted once it was answered
        time.sleep(0.05)
    before = children(process)
    os.kill(before[0], signal.SIGKILL)
    while len(children(process)) < 2 or before[0] in children(process):
        time.sleep(0.05)
    assert not list(tmp_path.glob(f"*/metrics/gauge_*_{before[0]}.db"))  # it holds no model any more
    assert list(tmp_path.glob(f"*/metrics/gauge_*_{before[1]}.db"))
    while value(text := ask("GET", "/metrics").text, 'interflow_model_loaded{model="digits",version="1"}') < 2:
        time.sleep(0.05)
    assert value(text, counted) == 10
    process.terminate()
    code, _, errors = finish(process)
    assert code == 0
    assert re.search(r"worker \d ended: killed by SIGKILL\. Another starts in 0\.5 s\.", errors)


def test_nothing_is_left_behind(workers, tmp_path):
    process, _ = workers()
    (folder,) = tmp_path.iterdir()
    assert folder.stat().st_mode & 0o077 == 0
    pids = children(process)
    process.terminate()
    code, _, errors = finish(process)
    assert code == 0, errors
    assert list(tmp_path.iterdir()) == []
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_a_second_signal_ends_all_at_once(workers, tmp_path):
    process, ask = workers(drain_s=60)
    pids = children(process)
    process.terminate()
    while ask("GET", "/readyz").status_code == 200:
        pass
    process.terminate()
    code, _, errors = finish(process)
    assert code == 128 + signal.SIGTERM, errors
    assert list(tmp_path.iterdir()) == []
    wait_until_gone(pids)


def test_workers_end_when_their_parent_is_killed(workers):
    process, _ = workers()
    pids = children(process)
    process.kill()
    wait_until_gone(pids)


def wait_until_gone(pids):
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        time.sleep(0.05)


def test_a_model_that_cannot_be_loaded_is_said_once_and_ends_the_start(start, artefact):
    model = artefact / "model.onnx"
    model.write_bytes(model.read_bytes()[:100_000])
    code, output, errors = finish(start("--workers", "2", exports=artefact.parents[1]))
    assert (code, output) == (1, "")
    (line,) = [line for line in errors.splitlines() if "model.onnx" in line]
    assert line.startswith("error: ")
    assert "Traceback" not in errors


def test_a_start_that_fails_waits_for_workers_that_do_not_answer(start, artefact):
    """One of them hangs, so it is still running when another says that it cannot start."""
    model = artefact / "model.onnx"
    model.write_bytes(model.read_bytes()[:100_000])
    process = start("--workers", "2", exports=artefact.parents[1])
    while not (pids := children(process)) or b"app.workers" not in Path(f"/proc/{pids[0]}/cmdline").read_bytes():
        time.sleep(0.005)
    os.kill(pids[0], signal.SIGSTOP)
    code, _, errors = finish(process)
    assert code == 1
    assert "Traceback" not in errors
    wait_until_gone(pids)


def test_a_replacement_that_cannot_start_does_not_end_the_others(workers, artefact):
    process, ask = workers(exports=artefact.parents[1])
    (artefact / "model.onnx").unlink()
    os.kill(children(process)[0], signal.SIGKILL)
    complaints = []
    for line in process.stderr:
        if "model.onnx is missing" in line:
            complaints.append(line)
            if len(complaints) == 2:
                break
    assert ask("POST", "/predict", content=IMAGE).status_code == 200


def test_a_server_whose_workers_all_died_waits_for_one_that_can_start(workers, artefact):
    process, ask = workers(exports=artefact.parents[1])
    whole = (artefact / "model.onnx").rename(artefact / "away.onnx")
    for pid in children(process):
        os.kill(pid, signal.SIGKILL)
    complaints = (line for line in process.stderr if "model.onnx is missing" in line)
    for _ in range(3):
        next(complaints)
    whole.rename(artefact / "model.onnx")
    assert ask("POST", "/predict", content=IMAGE).status_code == 200
    process.terminate()
    code, _, errors = finish(process)
    assert code == 0, errors


def test_a_replacement_loads_what_was_asked_for(workers, artefact):
    """A newer export that is broken was answered with the version before it, and with that it goes on."""
    process, ask = workers(exports=artefact.parents[1], management_key="sesame")
    broken = artefact.with_name("2")
    shutil.copytree(artefact, broken)
    (broken / "model.json").write_text("{")

    def load(**parameters):
        answer = ask(
            "POST",
            "/v2/repository/models/digits/load",
            headers={"X-API-Key": "sesame"},
            json={"parameters": parameters},
        )
        return answer.status_code

    assert load() == 400
    assert load(config=json.dumps({"version_policy": {"specific": {"versions": [1]}}})) == 200
    before = children(process)
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    while value(ask("GET", "/metrics").text, 'interflow_model_loaded{model="digits",version="1"}') < 2:
        time.sleep(0.05)
    assert not set(before) & set(children(process))
    process.terminate()
    code, _, errors = finish(process)
    assert code == 0
    assert "2/model.json" not in errors


def test_a_replacement_leaves_unloaded_what_was_unloaded(workers):
    process, ask = workers(management_key="sesame")
    path, key = "/v2/repository/models/digits", {"X-API-Key": "sesame"}
    assert ask("POST", f"{path}/unload", headers=key).status_code == 200
    for pid in children(process):
        os.kill(pid, signal.SIGKILL)
    assert ask("GET", "/readyz").status_code == 503
    assert ask("POST", f"{path}/load", headers=key).status_code == 200
    process.terminate()
    code, _, errors = finish(process)
    assert code == 0, errors


def test_requests_in_a_folder_that_is_given_outlive_the_server(workers, artefact, rewrite_card, tmp_path):
    newer = artefact.with_name("2")
    shutil.copytree(artefact, newer)
    rewrite_card(newer, version="2")
    given = {"exports": artefact.parents[1], "management_key": "sesame", "state_dir": tmp_path / "state" / "of digits"}
    for expected in ("2", "1"):
        process, ask = workers(**given)
        assert {ask("GET", "/model").json()["version"] for _ in range(10)} == {expected}
        config = json.dumps({"version_policy": {"specific": {"versions": [1]}}})
        path, key = "/v2/repository/models/digits/load", {"X-API-Key": "sesame"}
        assert ask("POST", path, headers=key, json={"parameters": {"config": config}}).status_code == 200
        process.terminate()
        code, _, errors = finish(process)
        assert code == 0, errors
        assert list(tmp_path.glob("interflow-*")) == []
        assert (tmp_path / "state" / "of digits" / "models.json").exists()


def test_a_folder_of_requests_that_cannot_be_made_ends_the_start(start, tmp_path):
    (tmp_path / "file").touch()
    code, output, errors = finish(start("--workers", "2", state_dir=tmp_path / "file"))
    assert (code, output) == (1, "")
    (line,) = errors.splitlines()
    assert line.startswith(f"error: INTERFLOW_STATE_DIR is {tmp_path / 'file'}, which cannot be written to")


def test_a_bad_number_of_workers(start):
    code, _, errors = finish(start("--workers", "0"))
    assert code == 1
    assert "INTERFLOW_WORKERS is '0'" in errors
