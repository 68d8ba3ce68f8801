"""What is on disk, and which of it a policy chooses."""

import json

import pytest

from app.errors import LoadRequestError
from app.session import ModelError
from app.settings import SettingsError
from app.versions import START_POLICIES, Request, Requests, find_versions, read_policy


@pytest.fixture
def exports(tmp_path):
    for path in ("digits/1", "digits/2", "digits/10", "other/3", "none"):
        (tmp_path / path).mkdir(parents=True)
    for other in ("digits/.4", "digits/05", "digits/latest", ".hidden/1"):
        (tmp_path / other).mkdir(parents=True)
    (tmp_path / "digits" / "7").write_text("a file")
    return tmp_path


def numbers(versions):
    return [version.number for version in versions]


def test_versions_by_number_and_what_holds_none(exports):
    found = find_versions(exports)
    assert {name: numbers(versions) for name, versions in found.items()} == {
        "digits": ["1", "2", "10"],
        "none": [],
        "other": ["3"],
    }


def test_a_changed_file_makes_another_version(exports):
    (before,) = find_versions(exports)["other"]
    assert find_versions(exports)["other"] == [before]
    for name in ("model.onnx", "model.json"):
        (exports / "other" / "3" / name).write_text("{}")
        (after,) = find_versions(exports)["other"]
        assert after != before
        before = after


@pytest.mark.parametrize("folder", ["nowhere", "empty"])
def test_nothing_there(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="cannot be read" if folder == "nowhere" else "no model is in"):
        find_versions(tmp_path / folder)


@pytest.mark.parametrize(
    ("policy", "chosen"),
    [
        ({"latest": {}}, ["10"]),
        ({"latest": {"num_versions": 2}}, ["2", "10"]),
        ({"latest": {"num_versions": 9}}, ["1", "2", "10"]),
        ({"all": {}}, ["1", "2", "10"]),
        ({"specific": {"versions": [2, 1]}}, ["1", "2"]),
        ({"specific": {"versions": ["10"]}}, ["10"]),  # protobuf's JSON writes 64-bit integers so
    ],
)
def test_policies_in_tritons_words(exports, policy, chosen):
    read = read_policy(json.dumps({"version_policy": policy}))
    assert numbers(read.choose(find_versions(exports)["digits"])) == chosen


def test_policies_of_the_start(exports):
    versions = find_versions(exports)["digits"]
    assert numbers(START_POLICIES["newest"].choose(versions)) == ["10"]
    assert START_POLICIES["all"].choose(versions) == versions


def test_versions_that_a_policy_names_and_that_are_not_there(exports):
    policy = read_policy('{"version_policy": {"specific": {"versions": [10, 4, 3]}}}')
    assert policy.missing(find_versions(exports)["digits"]) == [3, 4]
    assert START_POLICIES["newest"].missing([]) == []


@pytest.mark.parametrize(
    "config",
    [
        "",
        "[]",
        "{}",
        '{"version_policy": {}}',
        '{"version_policy": {"all": {}, "latest": {}}}',
        '{"version_policy": {"latest": null}}',
        '{"version_policy": {"all": {}, "latest": null}}',
        '{"version_policy": {"latest": {"num_versions": 0}}}',
        '{"version_policy": {"specific": {"versions": []}}}',
        '{"version_policy": {"newest": {}}}',
        '{"version_policy": {"all": {}}, "max_batch_size": 8}',
    ],
)
def test_other_configurations_are_refused(config):
    with pytest.raises(LoadRequestError, match=r"`config` cannot be used .*expected JSON such as"):
        read_policy(config)


# --- what is asked of workers ---


def test_requests_outlive_who_wrote_them(tmp_path):
    pinned = read_policy('{"version_policy": {"specific": {"versions": [1, 3]}}}')
    written = Requests(tmp_path / "made" / "with its parents")
    assert written.read() == {}
    with written.turn() as tell:
        tell("digits", pinned)
        tell("digits", START_POLICIES["newest"])
        told = {
            "digits": tell("digits", pinned),
            "other": tell("other", None),
            "all": tell("all", START_POLICIES["all"]),
        }
    assert told == {
        "digits": Request(3, pinned),
        "other": Request(1, None),
        "all": Request(1, START_POLICIES["all"]),
    }
    assert Requests(tmp_path / "made" / "with its parents").read() == told


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_a_folder_of_requests_that_cannot_be_had_is_named(tmp_path, folder):
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=f"INTERFLOW_STATE_DIR is {tmp_path / folder}, which cannot be written to"):
        Requests(tmp_path / folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"digits": 1}', '{"digits": [1, {"latest": null}]}'])
def test_requests_that_no_worker_wrote_are_refused(tmp_path, content):
    (tmp_path / "models.json").write_text(content)
    with pytest.raises(SettingsError, match=r"models.json is not what a worker wrote \(.*\); remove it"):
        Requests(tmp_path).read()
