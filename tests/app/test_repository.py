"""The newest version of every model is loaded; a server that starts, starts whole."""

import shutil

import pytest

from app.errors import ModelNotFoundError, NotReadyError
from app.repository import Repository, load_repository
from app.session import ModelError
from app.settings import Settings, SettingsError
from app.versions import START_POLICIES, Requests, VersionPolicy
from model.contract import CARD_FILE, ModelCard


def copy_as(artefact, rewrite_card, name, version, created=None):
    folder = artefact.parents[1] / name / version
    shutil.copytree(artefact, folder)
    provenance = {} if created is None else {"provenance": _provenance(artefact) | {"created": created}}
    rewrite_card(folder, name=name, version=version, **provenance)
    return folder


def _provenance(artefact):
    return ModelCard.from_json((artefact / CARD_FILE).read_bytes(), artefact).provenance.model_dump()


def test_the_highest_version_is_loaded(artefact, rewrite_card):
    for version in ("2", "10"):
        copy_as(artefact, rewrite_card, "digits", version)
    repository = load_repository(Settings(exports=artefact.parents[1]))
    assert [(model.card.name, model.card.version) for model in repository.models] == [("digits", "10")]
    repository.close()


def test_only_version_folders_count(artefact):
    (artefact.parent / "config.pbtxt").write_text("")
    for other in (".2", "2-old", "latest", "0", "01", "٣"):
        shutil.copytree(artefact, artefact.parent / other)
    (artefact.parents[1] / ".hidden").mkdir()
    (artefact.parents[1] / "README").write_text("")
    (artefact.parents[1] / "empty").mkdir()
    repository = load_repository(Settings(exports=artefact.parents[1]))
    assert [(model.card.name, model.card.version) for model in repository.models] == [("digits", "1")]
    repository.close()


def test_the_default_is_the_model_exported_last_or_the_one_that_is_set(artefact, rewrite_card):
    copy_as(artefact, rewrite_card, "newer", "1", created="2999-01-01T00:00:00Z")
    copy_as(artefact, rewrite_card, "older", "3", created="2001-01-01T00:00:00Z")
    exports = artefact.parents[1]
    repository = load_repository(Settings(exports=exports))
    assert repository.default.card.name == repository.get().card.name == "newer"
    assert repository.get("older", "3").card.version == "3"
    repository.close()
    chosen = load_repository(Settings(exports=exports, model="older"))
    assert chosen.default.card.name == "older"
    chosen.close()


def test_who_asks_for_another_model_is_told_what_is_loaded(colour_model):
    repository = Repository([colour_model(name="one", version="2"), colour_model(name="two", version="7")])
    for asked in (("three",), ("one", "1"), ("", None), (None, "8"), ("\0", "\0")):
        with pytest.raises(ModelNotFoundError, match=r"loaded are, with their versions: one \(2\), two \(7\)"):
            repository.get(*asked)


def test_the_newest_of_several_loaded_versions_answers(colour_model):
    repository = Repository([colour_model(version="10"), colour_model(version="9")])
    assert repository.get().card.version == "10"
    assert repository.get("colours", "9").card.version == "9"


def test_a_replaced_model_is_gone_in_one_step_and_the_others_stay(colour_model):
    one, two, three = (
        colour_model(name="one"),
        colour_model(name="two", version="2"),
        colour_model(name="two", version="3"),
    )
    repository = Repository([one, two])
    repository.replace("two", [three])
    assert repository.models == (one, three)
    repository.replace("four", [])
    assert repository.models == (one, three)
    repository.replace("one", [])
    assert repository.models == (three,)
    assert repository.get() is three


def test_all_versions_are_loaded_where_that_is_set(artefact, rewrite_card):
    copy_as(artefact, rewrite_card, "digits", "2")
    repository = load_repository(Settings(exports=artefact.parents[1], versions="all"))
    assert [model.card.version for model in repository.versions("digits")] == ["1", "2"]
    repository.close()


def test_nothing_loaded_is_never_ready():
    repository = Repository()
    assert not repository.ready
    with pytest.raises(NotReadyError):
        repository.get()
    with pytest.raises(NotReadyError):
        repository.get("digits")


@pytest.mark.parametrize("exists", [True, False])
def test_no_model_at_all(tmp_path, exists):
    exports = tmp_path / "exports"
    if exists:
        (exports / "digits").mkdir(parents=True)
    with pytest.raises(ModelError, match="no model is in" if exists else "No such file"):
        load_repository(Settings(exports=exports))


def test_exports_is_a_file(tmp_path):
    (tmp_path / "exports").write_text("")
    with pytest.raises(ModelError, match="Not a directory"):
        load_repository(Settings(exports=tmp_path / "exports"))


def test_the_model_that_is_set_is_not_there(artefact):
    with pytest.raises(ModelError, match=r"INTERFLOW_MODEL is 'digit', but .* holds digits"):
        load_repository(Settings(exports=artefact.parents[1], model="digit"))


def test_one_broken_model_stops_the_start(artefact, rewrite_card):
    broken = copy_as(artefact, rewrite_card, "broken", "1")
    (broken / "model.onnx").write_bytes(b"")
    with pytest.raises(ModelError, match="broken"):
        load_repository(Settings(exports=artefact.parents[1]))


@pytest.fixture
def ask(tmp_path):
    """Writes down what the workers were asked for; gives the settings of one that starts then."""

    def tell(artefact, **policies):
        with Requests(tmp_path / "state").turn() as told:
            for name, policy in policies.items():
                told(name, policy)
        return Settings(exports=artefact.parents[1], state_dir=tmp_path / "state")

    return tell


def test_what_workers_were_asked_for_comes_before_the_setting(artefact, rewrite_card, ask):
    """What is broken, and not asked for, is not looked at."""
    for name, version in (("digits", "2"), ("gone", "1")):
        (copy_as(artefact, rewrite_card, name, version) / "model.json").write_text("{")
    for version in ("1", "2"):
        copy_as(artefact, rewrite_card, "other", version)
    repository = load_repository(
        ask(artefact, digits=VersionPolicy.model_validate({"specific": {"versions": [1]}}), gone=None)
    )
    assert [(model.card.name, model.card.version) for model in repository.models] == [("digits", "1"), ("other", "2")]
    assert repository.asked.keys() == {"digits", "gone"}
    repository.close()


def test_versions_that_were_asked_for_and_are_gone_are_left_to_the_manager(artefact, ask):
    settings = ask(
        artefact,
        digits=VersionPolicy.model_validate({"specific": {"versions": [1, 7]}}),
        gone=START_POLICIES["newest"],
    )
    repository = load_repository(settings)
    assert [model.card.version for model in repository.models] == ["1"]
    assert repository.asked == {}
    repository.close()


def test_everything_was_unloaded(artefact, ask):
    assert not load_repository(ask(artefact, digits=None)).ready


def test_a_folder_of_requests_is_made_at_the_start_or_refused(artefact, tmp_path):
    settings = Settings(exports=artefact.parents[1], state_dir=tmp_path / "a" / "b")
    load_repository(settings).close()
    assert settings.state_dir.is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="INTERFLOW_STATE_DIR is"):
        load_repository(Settings(exports=artefact.parents[1], state_dir=tmp_path / "file"))
