"""What is handed to clusters: held against their own schemas, and against the server that it describes."""

import re
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from app import metrics
from app.server import GRACE_S
from app.settings import PREFIX, Settings
from app.workers import EXTRA_S

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
KUBERNETES = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
(KSERVE,) = yaml.safe_load_all((DEPLOY / "kserve.yaml").read_text())
PREDICTOR = {
    "minReplicas": {"type": "integer", "minimum": 0},
    "maxReplicas": {"type": "integer", "minimum": 1},
    "scaleTarget": {"type": "integer"},
    "scaleMetric": {"enum": ["cpu", "memory", "concurrency", "rps"]},
    "containerConcurrency": {"type": "integer", "minimum": 0},
    "timeout": {"type": "integer"},
    "canaryTrafficPercent": {"type": "integer", "minimum": 0, "maximum": 100},
    "labels": {"type": "object", "additionalProperties": {"type": "string"}},
    "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
    "deploymentStrategy": {"type": "object"},
}
"""By hand, after KServe's v1beta1 ComponentExtensionSpec: what a predictor has beside a pod's own fields."""


def of_kind(kind):
    (found,) = (document for document in KUBERNETES if document["kind"] == kind)
    return found


def pods():
    return {"kubernetes": of_kind("Deployment")["spec"]["template"]["spec"], "kserve": kserve_pod()}


def kserve_pod():
    return {name: value for name, value in KSERVE["spec"]["predictor"].items() if name not in PREDICTOR}


def kserve_deployment():
    """The Deployment that KServe makes of the predictor."""
    labels = {"app": "interflow"}
    spec = {"selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels}, "spec": kserve_pod()}}
    spec["strategy"] = KSERVE["spec"]["predictor"]["deploymentStrategy"]
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "interflow"}, "spec": spec}


def environment(pod):
    return {entry["name"]: entry.get("value") for entry in pod["containers"][0]["env"]}


@pytest.mark.parametrize("document", [*KUBERNETES, kserve_deployment()], ids=lambda document: document["kind"])
def test_the_schemas_of_kubernetes(document):
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(
            document | {"spec": document["spec"] | {"replicass": 1}}, kubernetes_validate.latest_version(), strict=True
        )


def test_the_inference_service():
    """Its pod is held against Kubernetes' schema above; this is the rest."""
    schema = {
        "type": "object",
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "additionalProperties": False,
        "properties": {
            "apiVersion": {"const": "serving.kserve.io/v1beta1"},
            "kind": {"const": "InferenceService"},
            "metadata": {
                "type": "object",
                "properties": {"name": {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"}},
            },
            "spec": {
                "type": "object",
                "required": ["predictor"],
                "additionalProperties": False,
                "properties": {"predictor": {"type": "object", "required": ["containers"], "properties": PREDICTOR}},
            },
        },
    }
    jsonschema.validate(KSERVE, schema)
    predictor = KSERVE["spec"]["predictor"]
    assert predictor["minReplicas"] <= predictor["maxReplicas"]
    assert predictor["containers"][0]["name"] == "kserve-container"


@pytest.mark.parametrize("name", ["kubernetes", "kserve"])
def test_the_settings_are_the_servers(name):
    pod = pods()[name]
    given = {key: value for key, value in environment(pod).items() if key.startswith(PREFIX)}
    settings = Settings(**{key.removeprefix(PREFIX).lower(): value for key, value in given.items()})
    assert set(given) <= {PREFIX + field.upper() for field in Settings.model_fields}
    (port,) = pod["containers"][0]["ports"]
    assert port["containerPort"] == settings.port
    assert pod["terminationGracePeriodSeconds"] >= settings.drain_s + GRACE_S + EXTRA_S
    assert settings.drain_s >= 5  # until a pod's address is withdrawn everywhere
    assert "lifecycle" not in pod["containers"][0]  # the server itself goes on meanwhile
    assert pod["enableServiceLinks"] is False


@pytest.mark.parametrize("name", ["kubernetes", "kserve"])
def test_the_probes_ask_routes_that_need_no_key(name, colours_app):
    client, paths = colours_app
    container = pods()[name]["containers"][0]
    asked = {kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")}
    assert {probe["path"] for probe in asked.values()} <= paths
    assert {probe["port"] for probe in asked.values()} <= {"http", container["ports"][0]["containerPort"]}
    for probe in asked.values():
        assert client.get(probe["path"]).status_code == 200
    assert client.get("/models").status_code == 401


@pytest.fixture(scope="module")
def colours_app():
    """A client of the application, with keys and without models' load; and the paths of its routes."""
    from starlette.testclient import TestClient

    from app.main import create_app

    app = create_app(Settings(api_keys="secret", exports=ROOT / "exports", model="digits", provider="cpu"))
    with TestClient(app) as client:
        yield client, set(client.get("/openapi.json", headers={"X-API-Key": "secret"}).json()["paths"])


@pytest.mark.parametrize("name", ["kubernetes", "kserve"])
def test_nothing_runs_as_root_or_writes_to_its_image(name):
    pod = pods()[name]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"]
    user = re.search(r"^USER (\d+):(\d+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert [pod["securityContext"][key] for key in ("runAsUser", "runAsGroup")] == [int(user[1]), int(user[2])]
    security = container["securityContext"]
    assert security["readOnlyRootFilesystem"]
    assert not security["allowPrivilegeEscalation"]
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert [(mount["name"], mount["mountPath"]) for mount in container["volumeMounts"]] == [("tmp", "/tmp")]  # noqa: S108
    assert pod["volumes"][0]["emptyDir"]


def test_the_parts_find_one_another():
    deployment, service, budget = of_kind("Deployment"), of_kind("Service"), of_kind("PodDisruptionBudget")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    for selector in (deployment["spec"]["selector"], budget["spec"]["selector"]):
        assert selector["matchLabels"].items() <= labels.items()
    assert service["spec"]["selector"].items() <= labels.items()
    target = of_kind("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
    assert "replicas" not in deployment["spec"]


def test_the_autoscaler_reads_the_servers_own_queue(colours_app):
    client, _ = colours_app
    autoscaler = of_kind("HorizontalPodAutoscaler")["spec"]
    (metric,) = (entry["pods"] for entry in autoscaler["metrics"])
    exposed = client.get("/metrics").text
    assert f"# TYPE {metric['metric']['name']} gauge" in exposed
    (rule,) = yaml.safe_load((DEPLOY / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    assert rule["name"]["as"] == metric["metric"]["name"]
    series = re.match(r"(\w+)\{", rule["seriesQuery"])[1]
    assert f"{series}{{" in exposed
    assert metrics.QUEUE_IMAGES._name == series
    assert 0 < int(metric["target"]["averageValue"]) < Settings().max_queue


def test_the_config_file_of_ray_serve(monkeypatch):
    schema = pytest.importorskip("ray.serve.schema")
    from app.cluster import UserConfig
    from app.cluster import app as build

    config = yaml.safe_load((DEPLOY / "serve.yaml").read_text())
    read = schema.ServeDeploySchema.model_validate(config)
    assert read.model_dump(exclude_unset=True, mode="json").keys() == config.keys()
    (application,) = read.applications
    for name, value in application.runtime_env["env_vars"].items():
        monkeypatch.setenv(name, value)
    (wanted,) = application.deployments
    ours = build({})._bound_deployment
    assert (application.import_path, wanted.name) == ("app.cluster:app", ours.name)
    UserConfig.model_validate(wanted.user_config)
    # http_options takes unknown names in silence
    assert config["http_options"].keys() <= schema.HTTPOptionsSchema.model_fields.keys()
    assert wanted.autoscaling_config["target_ongoing_requests"] < wanted.max_ongoing_requests
    assert read.http_options.keep_alive_timeout_s == Settings().keep_alive_s


def test_the_image_holds_what_the_server_imports():
    """All of model/ that it may import, by the contract that `test_seams.py` holds."""
    copied = set(re.findall(r"model/(\w+)\.py", (ROOT / "Dockerfile").read_text())) - {"__init__"}
    imported = {
        name
        for path in (ROOT / "app").rglob("*.py")
        for name in re.findall(r"^\s*from model\.(\w+) import", path.read_text(), re.MULTILINE)
    }
    assert imported
    assert copied >= imported
