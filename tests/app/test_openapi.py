"""The OpenAPI document against the server: schemathesis asks for all that it allows, and for what it does not.

Every answer has a documented status, media type and schema; what the document allows is accepted, and what it forbids
refused; other methods are answered 405, and what takes a key gives nothing without. The cases are the same each time.
"""

import io

import pytest
import schemathesis
from hypothesis import strategies as st
from PIL import Image
from schemathesis.config import SchemathesisConfig

from app.main import create_app
from app.repository import Repository, load_repository
from app.settings import Settings
from model.images import FORMATS

KEY = "sesame"
BELOW_500 = ("2xx", "3xx", "4xx")


def picture(kind, width, height):
    file = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).save(file, kind)
    return file.getvalue()


schemathesis.openapi.format(
    "binary", st.builds(picture, st.sampled_from(FORMATS), st.integers(1, 40), st.integers(1, 40))
)


def document():
    """As it is served, and an example of a tensor that fits the model, which no document can know."""
    document = create_app().openapi()
    image = {"name": "image", "shape": [1, 4, 4, 3], "datatype": "UINT8", "data": [7] * 48}
    for path, operations in document["paths"].items():
        if path.endswith("/infer"):
            operations["post"]["requestBody"]["content"]["application/json"]["example"] = {"inputs": [image]}
    return document


def half(dictionary):
    """A parameter that is a known value every other time, and anything else."""
    return {"dictionary": dictionary, "probability": 0.5}


def schema(generation, **settings):
    more_than_a_schema_says = {"positive_data_acceptance": {"enabled": False}}
    config = {
        "seed": 0,
        "cache": {"enabled": False},
        "generation": {"deterministic": True, "max-examples": 50} | generation,
        "dictionaries": {
            "model": {"values": ["layered"]},
            "version": {"values": ["1"]},
            "stage": {"values": ["fused", "conv2"]},
            "class": {"values": ["red", "2"]},
            "versus": {"values": ["runner-up", "green"]},
            "reloaded": {"values": ["digits"]},  # the default model stays, or the others would have none
        },
        "parameters": {
            "query.model": half("model"),
            "query.version": half("version"),
            "query.stage": half("stage"),
            "query.class": half("class"),
            "query.versus": half("versus"),
            "path.name": half("model"),
            "path.number": half("version"),
        },
        "operations": [
            {"include-path-regex": "load$", "parameters": {"path.name": half("reloaded")}},
            # whether a text is the right JSON, a tensor fits the model, it has such a stage, class or exit, and which
            # parameters go together
            {"include-path-regex": "/(load|explain|predict|batch)$", "checks": more_than_a_schema_says},
            {
                "include-path-regex": "/infer$",
                # a request may allow itself a microsecond
                "checks": more_than_a_schema_says | {"not_a_server_error": {"expected-statuses": [*BELOW_500, "504"]}},
                "parameters": {"path.name": "layered", "path.number": "1"},
            },
        ],
    }
    return schemathesis.openapi.from_dict(document(), config=SchemathesisConfig.from_dict(config | settings))


WITH_KEY = schema({"with-security-parameters": False}, headers={"X-API-Key": KEY})
WITHOUT_KEY = schema({})


@pytest.fixture(scope="module")
def unlocked(serve, only_bundled, make_layered_model):
    """Address of a server of all that there is: a model with layer attention, and another that can be loaded."""
    settings = Settings(exports=only_bundled, management_key=KEY)
    models = [make_layered_model(), *load_repository(settings).models]
    with serve(create_app(settings, Repository(models, "layered"))) as client:
        yield str(client.base_url)


@pytest.fixture(scope="module")
def locked(serve, make_layered_model):
    """Address of a server whose key nobody has."""
    with serve(create_app(Settings(api_keys="secret"), Repository([make_layered_model()]))) as client:
        yield str(client.base_url)


@WITH_KEY.parametrize()
def test_every_answer_is_as_documented(case, unlocked):
    case.call_and_validate(base_url=unlocked)


@WITHOUT_KEY.parametrize()
def test_so_is_every_answer_to_who_has_no_key(case, locked):
    case.call_and_validate(base_url=locked)
