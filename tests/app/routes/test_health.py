"""Alive is not ready; ready is never the vacuous truth of an empty list."""

from app.main import create_app
from app.repository import LoadedModel, Repository
from app.settings import Settings


def test_alive_but_not_ready_without_a_model(serve):
    """The same while models still load: the repository is empty until every one is warm."""
    with serve(create_app(Settings(), Repository())) as client:
        assert client.get("/healthz").json() == {"status": "alive"}
        answer = client.get("/readyz")
    assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
    assert answer.headers["content-type"] == "application/problem+json"


def test_ready_with_models_and_what_they_run_on(serve, colour_model):
    model = colour_model()
    fallback = model.runtime.model_copy(update={"requested_provider": "auto", "fallback": "no driver"})
    repository = Repository([LoadedModel(model.card, fallback, model.inference)])
    with serve(create_app(Settings(), repository)) as client:
        answer = client.get("/readyz")
    assert answer.status_code == 200
    assert answer.json() == {
        "status": "ready",
        "models": [{"name": "colours", "version": "1", "provider": "cpu", "fallback": "no driver"}],
    }
