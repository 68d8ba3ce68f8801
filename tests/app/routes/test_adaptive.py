"""POST /predict?mode=adaptive: which stage answers, what is said of it, and that others do not notice."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest

from app.main import create_app
from app.settings import Settings

FIRST, SECOND, NONE = [0.0, None, None], [None, 0.0, None], [None, None, None]
PHOTOS = ["chelsea.png", "astronaut.png", "rocket.jpg", "camera.png", "coffee.png"]


def policy(max_loss, thresholds):
    return {"max_loss": max_loss, "thresholds": thresholds, "accuracy": 0.9, "work": 0.5, "stops": [0.1, 0.2, 0.3, 0.4]}


@pytest.fixture
def adaptive(artefact, rewrite_card, serve):
    """A server of the bundled model with exits: none really at 0.001, all at stage 1 at 0.01, at stage 0 at 0.02."""
    rewrite_card(artefact, exits=[policy(0.001, NONE), policy(0.01, SECOND), policy(0.02, FIRST)])
    with serve(create_app(Settings(exports=artefact.parents[1], provider="cpu"))) as client:
        yield client


@pytest.fixture
def sources(photos):
    return [(photos / name).read_bytes() for name in PHOTOS]


def ask(client, source, **query):
    answer = client.post("/predict", params=query, content=source, headers={"Content-Type": "image/png"})
    assert answer.status_code == 200, answer.text
    return answer.json()


def without_times(answer):
    return {name: value for name, value in answer.items() if name not in {"request_id", "timing_ms"}}


def close(one, other):
    """The same but for rounding."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(close, one, other))
    if isinstance(one, float):
        return math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-5)
    return one == other


def test_who_goes_all_the_way_has_the_full_answer(adaptive, sources):
    for source in sources:
        full, answer = ask(adaptive, source), ask(adaptive, source, mode="adaptive")
        assert answer.pop("exit") is None
        assert "exit" not in full
        assert close(without_times(answer), without_times(full))


def test_who_stops_has_that_stage_s_reading(adaptive, sources):
    for source in sources:
        full, answer = ask(adaptive, source), ask(adaptive, source, mode="adaptive", max_loss=0.01)
        assert answer["exit"] == {"stage": full["stages"][1]["name"], "depth": full["stages"][1]["depth"]}
        assert close(answer["prediction"], full["stages"][1]["prediction"])
        assert close(answer["top_k"], full["stages"][1]["top_k"])
        for said, whole in zip(answer["stages"][:2], full["stages"][:2], strict=True):
            assert close(said["prediction"], whole["prediction"])
            assert (said["evaluated"], said["share"]) == (True, None)
            assert said["agrees"] is (whole["prediction"]["index"] == answer["prediction"]["index"])
        assert answer["agreement"] == sum(stage["agrees"] for stage in answer["stages"][:2]) / 2
        for said, whole in zip(answer["stages"][2:], full["stages"][2:], strict=True):
            known = {"name": whole["name"], "depth": whole["depth"], "evaluated": False, "top_k": []}
            assert said == known | dict.fromkeys(("prediction", "weight", "contribution", "share", "agrees"))


def test_contributions_of_a_stopped_answer_are_those_to_its_class(adaptive, sources):
    weights = adaptive.get("/model/branch-weights").json()["stages"]
    for source in sources:
        answer = ask(adaptive, source, mode="adaptive", max_loss=0.02)
        (stage, *_), label = answer["stages"], answer["prediction"]["label"]
        assert stage["weight"] == pytest.approx(weights[0]["weights"][label], rel=1e-5)
        full = ask(adaptive, source)
        if full["prediction"]["label"] == label:
            assert stage["contribution"] == pytest.approx(full["stages"][0]["contribution"], rel=1e-3, abs=1e-4)


def test_the_policy_is_the_last_one_that_loses_no_more(adaptive, sources):
    def stop(**query):
        found = ask(adaptive, sources[0], mode="adaptive", **query)["exit"]
        return None if found is None else found["depth"]

    depths = [stage["depth"] for stage in ask(adaptive, sources[0])["stages"]]
    assert [stop(max_loss=loss) for loss in (0.001, 0.0099, 0.01, 0.015, 0.02, 1)] == [
        None, None, depths[1], depths[1], depths[0], depths[0]
    ]  # fmt: skip
    assert stop() is None  # INTERFLOW_MAX_LOSS is 0.001


def test_the_setting_stands_in_for_the_query(artefact, rewrite_card, serve, sources):
    rewrite_card(artefact, exits=[policy(0.01, FIRST)])
    settings = Settings(exports=artefact.parents[1], provider="cpu", max_loss=0.05)
    with serve(create_app(settings)) as client:
        assert ask(client, sources[0], mode="adaptive")["exit"]["stage"] == "conv4"


def test_full_and_adaptive_requests_share_batches_and_are_not_mixed_up(artefact, rewrite_card, serve, sources):
    rewrite_card(artefact, exits=[policy(0.001, NONE), policy(0.01, SECOND), policy(0.02, FIRST)])
    settings = Settings(exports=artefact.parents[1], provider="cpu", batch_wait_us=5000, lanes=1)
    queries = [{}, *({"mode": "adaptive", "max_loss": loss} for loss in (0.001, 0.01, 0.02)), {"explain": "maps"}]
    with serve(create_app(settings)) as client, ThreadPoolExecutor(16) as pool:
        jobs = [(source, query) for source in sources for query in queries]
        expected = [without_times(ask(client, source, **query)) for source, query in jobs]
        for _ in range(3):
            answers = list(pool.map(lambda job: without_times(ask(client, job[0], **job[1])), jobs))
            for answer, alone in zip(answers, expected, strict=True):
                maps, alone_maps = answer.pop("maps", None), dict(alone).pop("maps", None)
                assert (maps is None) == (alone_maps is None)
                assert close(answer, {name: value for name, value in alone.items() if name != "maps"})
        text = client.get("/metrics").text
    of_model = [line for line in text.splitlines() if 'model="digits"' in line]  # other tests count others
    alone, every = (
        float(next(line for line in of_model if line.startswith(f"interflow_batch_images_{kind}")).split()[-1])
        for kind in ('bucket{le="1.0"', "count")
    )
    assert alone < every  # some ran together


def test_a_batch_gives_what_its_images_give_alone(adaptive, sources):
    query = {"mode": "adaptive", "max_loss": 0.01}
    files = [("images", ("x", source, "image/png")) for source in (*sources, b"no image")]
    *results, refused = adaptive.post("/predict/batch", params=query, files=files).json()["results"]
    assert refused["status"] == 400
    for result, source in zip(results, sources, strict=True):
        assert close(without_times(result), without_times(ask(adaptive, source, **query)))


@pytest.mark.parametrize(
    ("query", "status_and_code"),
    [
        ("mode=adaptive&max_loss=0.0009", (422, "no_exit")),
        ("mode=adaptive&max_loss=0", (422, "no_exit")),
        ("mode=adaptive&max_loss=-0.1", (422, "invalid_parameter")),
        ("mode=adaptive&max_loss=1.1", (422, "invalid_parameter")),
        ("mode=adaptive&max_loss=nan", (422, "invalid_parameter")),
        ("mode=adaptive&max_loss=", (422, "invalid_parameter")),
        ("mode=quick", (422, "invalid_parameter")),
        ("mode=adaptive&explain=maps", (422, "invalid_parameter")),
        ("mode=adaptive&layers=true", (422, "invalid_parameter")),
        ("max_loss=0.01", (422, "invalid_parameter")),
    ],
)
def test_what_cannot_be_kept_is_refused(adaptive, sources, query, status_and_code):
    for route in ("/predict", "/predict/batch"):
        answer = adaptive.post(f"{route}?{query}", files={"images": sources[0]})
        assert (answer.status_code, answer.json()["code"]) == status_and_code, answer.text


def test_a_model_without_exits_says_so(artefact, rewrite_card, serve, sources):
    rewrite_card(artefact, exits=[])
    with serve(create_app(Settings(exports=artefact.parents[1], provider="cpu"))) as client:
        answer = client.post("/predict?mode=adaptive", content=sources[0], headers={"Content-Type": "image/png"})
    assert (answer.status_code, answer.json()["code"]) == (422, "no_exit")
    assert "lists no `exits`" in answer.json()["detail"]


def test_stops_are_counted(adaptive, sources):
    def counted():
        return {
            line.split('stage="')[1].split('"')[0]: float(line.split()[-1])
            for line in adaptive.get("/metrics").text.splitlines()
            if line.startswith("interflow_adaptive_answers_total")
        }

    before = counted()
    for loss, times in {0.001: 3, 0.01: 2, 0.02: 1}.items():
        for _ in range(times):
            ask(adaptive, sources[0], mode="adaptive", max_loss=loss)
    ask(adaptive, sources[0])
    gained = {stage: count - before.get(stage, 0) for stage, count in counted().items()}
    assert {stage: count for stage, count in gained.items() if count} == {"conv13": 3, "conv7": 2, "conv4": 1}
