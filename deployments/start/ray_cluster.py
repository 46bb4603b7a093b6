"""Ray and Serve on this machine: on loopback only, without usage reports, and removed at the end.

Ray reads its settings when it is imported, so `prepare_environment` must run before: the functions
here import it late.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.config import Config
from cluster.errors import Unavailable
from cluster.files import write_private

APP_NAME = "briolette"


def prepare_environment(config: Config) -> None:
    """Set Ray's environment variables, for this process and all that it starts."""
    token = config.state_dir / "ray_token"
    write_private(token, secrets.token_hex(32))
    os.environ.update(
        {
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # the machine's address becomes 127.0.0.1
            "RAY_enable_metrics_collection": "0",  # its exporter would listen on every address
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_worker_niceness": "0",  # replicas compute: Serve would run them at nice 15
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",  # a hung host would hold its memory
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a part without a GPU sees none
        }
    )


@contextmanager
def ray_cluster(config: Config, ray_dir: Path) -> Iterator[None]:
    """Run Ray and Serve during a `with` block, with their files in `ray_dir`."""
    import ray
    from ray import serve

    try:
        ray.init(
            namespace=config.ray.namespace,
            configure_logging=False,
            log_to_driver=False,
            **_own_ray(config, ray_dir),
        )
        serve.start(proxy_location="Disabled")
        yield
    finally:
        if ray.is_initialized():
            serve.shutdown()
            ray.shutdown()


def run_app(application: Any) -> None:
    """Deploy a Serve application without waiting for its replicas."""
    from ray import serve
    from ray.serve.api import RunTarget

    serve.run_many(
        [RunTarget(application, name=APP_NAME, route_prefix=None)],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )


def check_app() -> None:
    """Raise Unavailable, with Serve's message, if the application could not be deployed."""
    from ray import serve

    app = serve.status().applications.get(APP_NAME)
    if app is not None and app.status.value == "DEPLOY_FAILED":
        messages = [d.message for d in app.deployments.values() if d.message] or [app.message]
        raise Unavailable("Ray Serve could not start a part: " + _last_line(messages[0]))


def num_gpus() -> float:
    """Return the number of GPUs that Ray has found."""
    import ray

    return float(ray.cluster_resources().get("GPU", 0.0))


def _own_ray(config: Config, ray_dir: Path) -> dict[str, Any]:
    return {
        # Ray starts as many processes at once as it has CPUs; the parts ask for none.
        "num_cpus": config.ray.num_cpus or 4 + config.experts.num_hosts,
        "num_gpus": config.ray.num_gpus,
        "object_store_memory": config.ray.object_store_bytes,
        "include_dashboard": config.ray.dashboard,
        "_temp_dir": str(ray_dir),
    }


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1]
