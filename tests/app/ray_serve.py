"""A small Ray Serve for `test_cluster.py`, a process of its own: `python -m tests.app.ray_serve '{"port": ...}'`.

Says `ready` when all applications are, and then deploys the application `two`, which is in a config file's form, again
for each line of its input: its user_config and its settings, as JSON. It ends with its input.
"""

import json
import sys
import time
from pathlib import Path

import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from app.cluster import Replica
from app.main import create_app
from app.repository import Repository
from app.settings import Settings, variable
from tests.app.conftest import ColourNetwork, _colour_card, _layered_model, _loaded


def colours(settings):
    return create_app(settings, Repository([_loaded(_colour_card(), ColourNetwork())]))


def layered(settings):
    models = [_layered_model(), _loaded(_colour_card(), ColourNetwork())]
    return create_app(settings, Repository(models, "layered"))


class SlowNetwork(ColourNetwork):
    def run(self, images, names, thresholds=None, *, alone=False):
        time.sleep(0.5)
        return super().run(images, names, thresholds)


def slow(settings):
    return create_app(settings, Repository([_loaded(_colour_card(), SlowNetwork())]))


def run(name, settings, build=create_app, **options):
    chosen = {"num_replicas": 1, "autoscaling_config": None, "ray_actor_options": {"num_cpus": 0}} | options
    path = "/" if name == "colours" else f"/{name}"  # tritonclient takes an address without a path
    serve.run(Replica.options(**chosen).bind(settings, build), name=name, route_prefix=path)


def deploy_two(settings, user_config=None):
    """As `serve run` and `serve deploy` do with a config file."""
    deployment = {
        "name": "Interflow",
        "num_replicas": 2,
        "autoscaling_config": None,
        "ray_actor_options": {"num_cpus": 0},
        "user_config": user_config or {},
    }
    application = {
        "name": "two",
        "route_prefix": "/two",
        "import_path": "app.cluster:app",
        "runtime_env": {"env_vars": {variable(name): str(value) for name, value in settings.items()}},
        "deployments": [deployment],
    }
    config = ServeDeploySchema.model_validate({"applications": [application]})
    _get_global_client().deploy_apps(config, _blocking=True)


def start_ray():
    """Where two begin at the same moment (xdist), one may take a port that the other had found free."""
    for tries_left in (2, 1, 0):
        try:
            ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        except Exception:
            ray.shutdown()
            if not tries_left:
                raise
        else:
            return


def main():
    given = json.loads(sys.argv[1])
    start_ray()
    serve.start(http_options={"host": "127.0.0.1", "port": given["port"]})
    common = {"provider": "cpu", "threads": 1, "lanes": 1}
    run("colours", Settings(max_bytes=100_000, max_pixels=1_000_000, **common), colours)
    run("layered", Settings(**common), layered)
    run("digits", Settings(exports=Path(given["digits"]), **common))
    run("both", Settings(exports=Path(given["both"]), **common))
    run("slow", Settings(**common), slow, max_ongoing_requests=1, max_queued_requests=1)
    settings = {"exports": given["two"], "state_dir": given["state"], "management_key": "secret", **common}
    deploy_two(settings)
    print("ready", flush=True)
    for line in sys.stdin:
        changed = json.loads(line)
        deploy_two(settings | changed["settings"], changed["user_config"])
        print("done", flush=True)
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
