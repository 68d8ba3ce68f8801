"""Loading, reloading and unloading while serving; what is broken is refused, and what was loaded stays."""

import asyncio
import gc
import json
import os
import shutil
import statistics
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import numpy as np
import pytest

from app.errors import LoadError, ModelNotFoundError, NotReadyError
from app.manager import Manager
from app.repository import Repository, load_repository
from app.settings import Settings
from app.versions import VersionPolicy

ROOT = Path(__file__).parents[2]
SPECIFIC_1 = VersionPolicy.model_validate({"specific": {"versions": [1]}})
SPECIFIC_BOTH = VersionPolicy.model_validate({"specific": {"versions": [1, 2]}})


@pytest.fixture
def managed(artefact):
    """Makes a manager, and the repository that it has, of the exports around `artefact`; closes both."""
    made = []

    def make(**settings):
        given = Settings(exports=artefact.parents[1], provider="cpu", threads=1, lanes=1, **settings)
        repository = load_repository(given)
        made.append(manager := Manager(given, repository))
        return manager, repository

    yield make
    for manager in made:
        manager.close()
        manager._repository.close()


@pytest.fixture
def add(artefact, rewrite_card):
    """Adds a version to the exports around `artefact`."""

    def copy(version="2", name="digits"):
        folder = artefact.parents[1] / name / version
        shutil.copytree(artefact, folder)
        rewrite_card(folder, name=name, version=version)
        return folder

    return copy


def spoil(folder):
    model = folder / "model.onnx"
    model.write_bytes(model.read_bytes()[:1000])


def loaded(repository):
    return [(model.card.name, model.card.version) for model in repository.models]


def black_image(model):
    spec = model.card.input
    return np.zeros((1, spec.height, spec.width, spec.channels), np.uint8)


def lanes():
    return [thread for thread in threading.enumerate() if thread.name.startswith("lane")]


def eventually(holds):
    for _ in range(3000):
        if holds():
            return
        time.sleep(0.01)
    pytest.fail("it never came to hold")


def test_a_load_puts_the_newest_in_the_place_of_what_is_loaded(managed, add):
    manager, repository = managed()
    add("2")
    assert loaded(repository) == [("digits", "1")]
    manager.load("digits")
    assert loaded(repository) == [("digits", "2")]
    assert repository.get("digits").card.version == "2"


def test_a_load_can_name_the_versions(managed, add):
    add("2")
    manager, repository = managed()
    manager.load("digits", SPECIFIC_BOTH)
    assert loaded(repository) == [("digits", "1"), ("digits", "2")]
    assert repository.get().card.version == "2"
    manager.load("digits", SPECIFIC_1)
    assert loaded(repository) == [("digits", "1")]
    manager.load("digits")
    assert loaded(repository) == [("digits", "2")]


def test_all_versions_from_the_start(managed, add):
    add("2")
    manager, repository = managed(versions="all")
    assert loaded(repository) == [("digits", "1"), ("digits", "2")]
    add("3")
    manager.load("digits")
    assert loaded(repository) == [("digits", "1"), ("digits", "2"), ("digits", "3")]


def test_a_load_is_a_reload(managed):
    manager, repository = managed()
    before = repository.get()
    manager.load("digits")
    assert repository.get() is not before


def test_a_broken_version_is_refused_and_the_old_one_stays(managed, add):
    manager, repository = managed()
    before = repository.get()
    spoil(add("2"))
    for policy in (None, SPECIFIC_BOTH):
        with pytest.raises(LoadError, match=r"2/model.onnx: not a readable ONNX model.* What was loaded stays"):
            manager.load("digits", policy)
        assert repository.models == (before,)


def test_what_is_not_on_disk_is_not_loaded(managed):
    manager, repository = managed()
    with pytest.raises(ModelNotFoundError, match=r"'other' is not in .* there are of it: no versions"):
        manager.load("other")
    with pytest.raises(ModelNotFoundError, match=r"'digits', version 2, is not in .* there are of it: 1"):
        manager.load("digits", SPECIFIC_BOTH)
    with pytest.raises(ModelNotFoundError):
        manager.load("../exports/digits")
    assert loaded(repository) == [("digits", "1")]


def test_unloading_one_model_and_then_the_last(managed, add):
    add(name="other", version="1")
    manager, repository = managed(model="digits")
    manager.unload("digits")
    with pytest.raises(ModelNotFoundError, match="'digits' is not loaded; loaded are, with their versions: other"):
        repository.get()
    assert repository.ready
    manager.unload("other")
    assert not repository.ready
    with pytest.raises(NotReadyError):
        repository.get()
    with pytest.raises(ModelNotFoundError, match="'other' is not loaded"):
        manager.unload("other")


def test_what_is_unloaded_is_freed_and_so_is_what_is_replaced(managed):
    """Its threads end and nothing keeps the network, whether it answered before or not."""
    gc.collect()
    others = len(lanes())
    manager, repository = managed()
    networks = []
    for _ in range(10):
        model = repository.get()
        networks.append(weakref.ref(model.inference))
        asyncio.run(model.inference.infer(black_image(model), ["logits"]))
        del model
        manager.load("digits")
    eventually(lambda: len(lanes()) == others + 1)
    assert [network() for network in networks] == [None] * 10
    manager.unload("digits")
    eventually(lambda: len(lanes()) == others)


def test_who_holds_the_old_one_can_still_ask_it(managed):
    manager, repository = managed()
    model = repository.get()
    manager.unload("digits")
    inferred = asyncio.run(model.inference.infer(black_image(model), ["logits"]))
    assert inferred.outputs["logits"].shape == (1, 10)


def test_the_index_has_what_is_loaded_and_what_could_be(managed, add):
    add("2")
    manager, _ = managed()
    add("10")
    spoil(add("1", name="broken"))
    entries = [tuple(entry.model_dump().values()) for entry in manager.index()]
    assert entries == [
        ("broken", "1", "UNAVAILABLE", "not loaded"),
        ("digits", "1", "UNAVAILABLE", "not loaded"),
        ("digits", "2", "READY", ""),
        ("digits", "10", "UNAVAILABLE", "not loaded"),
    ]
    assert [(entry.name, entry.version) for entry in manager.index(ready=True)] == [("digits", "2")]


def test_the_event_loop_runs_on_while_a_model_is_loaded(managed, monkeypatch):
    gate = threading.Event()
    manager, _ = managed()
    monkeypatch.setattr("app.manager.load_model", lambda version, settings: gate.wait(30) and _stop())

    def _stop():
        raise LoadError("enough")

    async def scenario():
        loading = asyncio.create_task(manager.run(manager.load, "digits"))
        await asyncio.sleep(0.01)
        assert not loading.done()
        gate.set()  # only a free loop comes here
        with pytest.raises(LoadError, match="enough"):
            await loading

    asyncio.run(scenario())


# --- what polls see ---


def test_polls_load_a_new_version_once_it_is_settled(managed, add):
    manager, repository = managed()
    manager.poll()
    before = repository.get()
    add("2")
    manager.poll()
    assert repository.models == (before,)
    manager.poll()
    assert loaded(repository) == [("digits", "2")]


def test_polls_leave_what_did_not_change(managed):
    manager, repository = managed()
    before = repository.models
    for _ in range(3):
        manager.poll()
    assert repository.models == before


def test_polls_load_a_new_model_and_unload_one_whose_folder_went(managed, add):
    manager, repository = managed()
    folder = add("1", name="other")
    manager.poll()
    manager.poll()
    assert loaded(repository) == [("digits", "1"), ("other", "1")]
    shutil.rmtree(folder.parent)
    manager.poll()
    assert loaded(repository) == [("digits", "1")]


def test_polls_go_back_when_the_newest_version_is_removed(managed, add):
    folder = add("2")
    manager, repository = managed()
    manager.poll()
    shutil.rmtree(folder)
    manager.poll()
    assert loaded(repository) == [("digits", "1")]


def test_polls_reload_a_version_that_was_exported_again(managed, artefact, rewrite_card):
    manager, repository = managed()
    rewrite_card(artefact, temperature=7.5)
    manager.poll()
    manager.poll()
    assert repository.get().card.temperature == 7.5


def test_polls_do_not_pick_up_half_a_copy(managed, artefact, rewrite_card, logs):
    """Copied by hand, slower than the polls come: never tried before all is there."""
    manager, repository = managed()
    folder = artefact.parent / "2"
    folder.mkdir()
    manager.poll()
    content = (artefact / "model.onnx").read_bytes()
    shutil.copy(artefact / "model.json", folder)
    for part in (1, 2, 3):
        (folder / "model.onnx").write_bytes(content[: part * len(content) // 4])
        manager.poll()
    (folder / "model.onnx").write_bytes(content)
    rewrite_card(folder, version="2")
    manager.poll()
    assert loaded(repository) == [("digits", "1")]
    assert not [record for record in logs.records if record.levelname == "ERROR"]
    manager.poll()
    assert loaded(repository) == [("digits", "2")]


def test_polls_refuse_a_broken_version_once_and_load_it_when_it_is_mended(managed, add, logs):
    manager, repository = managed()
    before = repository.models
    broken = add("2")
    whole = (broken / "model.onnx").read_bytes()
    spoil(broken)
    for _ in range(5):
        manager.poll()
    errors = [record.getMessage() for record in logs.records if record.levelname == "ERROR"]
    assert len(errors) == 1
    assert errors[0].startswith(f"{broken}/model.onnx: not a readable ONNX model")
    assert repository.models == before
    assert {entry.version: entry.reason for entry in manager.index()}["2"] in errors[0]
    (broken / "model.onnx").write_bytes(whole)
    for _ in range(2):
        manager.poll()
    assert loaded(repository) == [("digits", "2")]


def test_polls_go_on_beside_a_broken_version(managed, add):
    manager, repository = managed(versions="all")
    spoil(add("2"))
    add("3")
    for _ in range(3):
        manager.poll()
    assert loaded(repository) == [("digits", "1"), ("digits", "3")]


def test_a_loaded_version_that_is_overwritten_with_a_broken_one_stays(managed, artefact, rewrite_card):
    manager, repository = managed()
    before = repository.models
    second = artefact.with_name("2")
    whole = shutil.copytree(artefact, second.with_name(".2"))
    manager.poll()
    spoil(artefact)
    for _ in range(3):
        manager.poll()
    assert repository.models == before
    whole.rename(second)
    rewrite_card(second, version="2")
    for _ in range(2):
        manager.poll()
    assert loaded(repository) == [("digits", "2")]


def test_polls_leave_unloaded_what_a_request_unloaded_until_a_request_loads_it(managed, add):
    manager, repository = managed()
    manager.poll()
    manager.unload("digits")
    add("2")
    for _ in range(2):
        manager.poll()
    assert not repository.models
    manager.load("digits", SPECIFIC_1)
    for _ in range(2):
        manager.poll()
    assert loaded(repository) == [("digits", "1")]


def test_an_exports_folder_that_went_away_changes_nothing_and_is_logged_once(managed, artefact, logs):
    manager, repository = managed()
    exports = artefact.parents[1]
    exports.rename(exports.with_name("elsewhere"))
    for _ in range(3):
        manager.poll()
    exports.mkdir()  # a mount point without its volume
    for _ in range(3):
        manager.poll()
    assert loaded(repository) == [("digits", "1")]
    messages = [record.getMessage() for record in logs.records if record.levelname == "ERROR"]
    assert ["cannot be read" in message for message in messages] == [True, False]
    assert "no model is in" in messages[1]


def test_watching_polls_as_often_as_it_is_set_and_survives_a_failure(managed, monkeypatch, logs):
    manager, _ = managed(poll_s=0.001)
    looks = []

    def look():
        looks.append(threading.current_thread().name)
        if len(looks) == 1:
            raise OSError("once")

    monkeypatch.setattr(manager, "poll", look)

    async def scenario():
        watching = asyncio.create_task(manager.watch())
        while len(looks) < 3:
            await asyncio.sleep(0.001)
        watching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await watching

    asyncio.run(scenario())
    assert all(name.startswith("manager") for name in looks)
    assert "looking for changed models failed" in logs.text


def test_nothing_is_watched_unless_it_is_asked_for(managed, monkeypatch):
    manager, _ = managed()
    monkeypatch.setattr(manager, "poll", lambda: pytest.fail("polled"))
    asyncio.run(asyncio.wait_for(manager.watch(), 30))


# --- several workers ---


def test_what_one_worker_is_asked_for_the_others_do(managed, add, tmp_path):
    add("2")
    (one, first), (two, second) = managed(state_dir=tmp_path), managed(state_dir=tmp_path)
    one.load("digits", SPECIFIC_1)
    assert loaded(second) == [("digits", "2")]
    two.follow()
    assert loaded(second) == [("digits", "1")]
    model = second.get()
    two.follow()
    one.follow()
    assert second.get() is model  # done once, and not handed back
    two.unload("digits")
    one.follow()
    assert not first.models
    one.load("digits")
    one.load("digits")
    two.follow()
    assert loaded(first) == loaded(second) == [("digits", "2")]


def test_a_worker_that_starts_later_starts_with_what_was_asked_for(managed, add, tmp_path):
    add("1", name="other")
    add("2")
    one, _ = managed(state_dir=tmp_path)
    one.unload("other")
    one.load("digits", SPECIFIC_1)
    later, repository = managed(state_dir=tmp_path)
    before = repository.models
    assert loaded(repository) == [("digits", "1")]
    later.follow()
    for _ in range(2):
        later.poll()
    assert repository.models == before  # nothing is loaded twice, and polls keep to it
    one.load("other")
    later.follow()
    assert loaded(repository) == [("digits", "1"), ("other", "1")]


def test_a_worker_that_starts_later_misses_a_version_that_is_gone_until_it_is_back(managed, add, tmp_path, logs):
    folder = add("2")
    one, _ = managed(state_dir=tmp_path)
    one.load("digits", SPECIFIC_BOTH)
    folder.rename(folder.with_name(".2"))
    later, repository = managed(state_dir=tmp_path)
    later.follow()
    assert loaded(repository) == [("digits", "1")]
    assert "'digits', version 2, is not in" in logs.text
    folder.with_name(".2").rename(folder)
    later.follow()
    assert loaded(repository) == [("digits", "1"), ("digits", "2")]


def test_a_worker_does_what_others_were_asked_for_before_its_own(managed, add, tmp_path):
    add("2")
    (one, first), (two, second) = managed(state_dir=tmp_path), managed(state_dir=tmp_path)
    one.unload("digits")
    with pytest.raises(ModelNotFoundError, match="not loaded"):
        two.unload("digits")
    two.load("digits", SPECIFIC_1)
    one.follow()
    assert loaded(first) == loaded(second) == [("digits", "1")]


def test_what_fails_at_the_worker_that_is_asked_no_other_tries(managed, add, tmp_path, logs):
    (one, first), (two, second) = managed(state_dir=tmp_path), managed(state_dir=tmp_path)
    spoil(add("2"))
    with pytest.raises(LoadError):
        one.load("digits")
    two.follow()
    assert loaded(first) == loaded(second) == [("digits", "1")]
    assert not [record for record in logs.records if record.levelname == "ERROR"]


def test_a_worker_that_cannot_follow_says_so_once_keeps_what_it_has_and_tries_again(managed, add, tmp_path, logs):
    (one, _), (two, second) = managed(state_dir=tmp_path), managed(state_dir=tmp_path)
    folder = add("2")
    whole = (folder / "model.onnx").read_bytes()
    one.load("digits")
    spoil(folder)
    two.follow()
    two.follow()
    assert loaded(second) == [("digits", "1")]
    (error,) = [record.getMessage() for record in logs.records if record.levelname == "ERROR"]
    assert error.startswith("this worker could not do what all were asked for, and tries again: ")
    (folder / "model.onnx").write_bytes(whole)
    two.follow()
    assert loaded(second) == [("digits", "2")]
    one.load("digits")
    spoil(folder)
    two.follow()
    assert len([record for record in logs.records if record.levelname == "ERROR"]) == 2  # it is another request


def test_a_worker_that_cannot_follow_one_model_follows_the_others(managed, add, tmp_path, logs, monkeypatch):
    add("1", name="other")
    (one, _), (two, second) = managed(state_dir=tmp_path), managed(state_dir=tmp_path)
    one.load("digits")
    one.unload("other")
    before = second.get("digits")
    with monkeypatch.context() as patch:
        patch.setattr("app.manager.load_model", lambda version, settings: _fail())
        two.follow()
    assert second.models == (before,)
    assert "Traceback" in logs.text
    assert "MemoryError" in logs.text
    two.follow()
    assert second.get("digits") is not before


def _fail():
    raise MemoryError


def test_without_other_workers_following_is_nothing():
    manager = Manager(Settings(), Repository())
    manager.follow()
    manager.close()


def test_all_processes_of_a_server_unload_and_load(start):
    """Each request goes to whichever process takes the connection; in the end all of them agree."""
    process = start(workers=2, provider="cpu", threads=1, lanes=1, management_key="sesame")
    address = process.stdout.readline().split(" on ")[1].split(";")[0]

    def all_answer(status):
        return all(
            httpx2.get(f"{address}/v2/models/digits/ready", trust_env=False).status_code == status for _ in range(20)
        )

    try:
        for verb, status in (("unload", 503), ("load", 200)):
            path = f"{address}/v2/repository/models/digits/{verb}"
            assert httpx2.post(path, headers={"X-API-Key": "sesame"}, trust_env=False, timeout=60).status_code == 200
            eventually(lambda status=status: all_answer(status))
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert errors.count("model digits: unloaded") == errors.count("model digits: loaded is now version 1") == 2


def resident_bytes(process):
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux' /proc")
@pytest.mark.parametrize("query", ["", "?mode=adaptive&max_loss=0.01"])
def test_reloads_under_load_fail_no_request_answer_none_wrong_and_keep_no_memory(
    start, artefact, add, rewrite_card, query
):
    """Two versions in turn, told apart by the temperature of their confidence; adaptive, the first stops early."""
    policy = {"max_loss": 0.01, "accuracy": 1, "work": 1, "stops": [0, 0, 0, 1]}
    rewrite_card(add("2"), version="2", temperature=20.0, exits=[policy | {"thresholds": [None, None, None]}])
    rewrite_card(artefact, exits=[policy | {"thresholds": [None, 0.3, None]}])
    pictures = [path.read_bytes() for path in (ROOT / "app" / "static" / "examples").glob("digits-*.png")]
    key = {"X-API-Key": "sesame"}
    settings = {"provider": "cpu", "threads": 1, "lanes": 1, "log_level": "warning"}  # nobody reads what it logs
    process = start(exports=artefact.parents[1], management_key="sesame", **settings)
    address = process.stdout.readline().split(" on ")[1].split(";")[0]
    done = threading.Event()

    def ask(client, picture):
        answer = client.post(f"/predict{query}", files={"image": picture})
        assert answer.status_code == 200, answer.text
        body = answer.json()
        return body["model"]["version"], body["prediction"]["label"], body["prediction"]["confidence"]

    def keep_asking():
        answers = []
        with httpx2.Client(base_url=address, trust_env=False, timeout=60) as client:
            while not done.is_set():
                answers += [(number, ask(client, picture)) for number, picture in enumerate(pictures)]
        return answers

    try:
        with httpx2.Client(base_url=address, trust_env=False, timeout=60) as client, ThreadPoolExecutor(8) as pool:

            def load(version):
                config = json.dumps({"version_policy": {"specific": {"versions": [version]}}})
                body = {"parameters": {"config": config}}
                assert client.post("/v2/repository/models/digits/load", json=body, headers=key).status_code == 200
                return [ask(client, picture) for picture in pictures]

            right = {str(version): load(version) for version in (1, 2)}
            asking = [pool.submit(keep_asking) for _ in range(8)]
            sizes = []
            try:
                for version in [1, 2] * 15:
                    assert {answer[0] for answer in load(version)} == {str(version)}
                    sizes.append(resident_bytes(process))
            finally:
                done.set()
            answers = [answer for future in asking for answer in future.result()]
    finally:
        process.terminate()
        process.communicate(timeout=60)
    assert {version for _, (version, _, _) in answers} == {"1", "2"}
    for number, (version, label, confidence) in answers:
        assert (version, label, pytest.approx(confidence, abs=0.002)) == right[version][number]
    assert all(one[2] > two[2] + 0.01 for one, two in zip(right["1"], right["2"], strict=True))
    # the first loads fill what is kept for the next ones; every model that stayed would add 4 MiB
    assert statistics.median(sizes[-10:]) < 1.1 * statistics.median(sizes[5:15])
