"""Ray Serve's own HTTP ingress with an application that returns a constant, in a Ray of its own.

`python -m bench.team.serve_ingress STATE_DIR PORT` serves until its input ends.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.lib.peers import NotMeasured
from cluster.config import Config

START_S = 120.0
STOP_S = 30.0


@contextmanager
def serve_ingress(state_dir: Path) -> Iterator[int]:
    """The port of the ingress, on loopback. Raises NotMeasured when it doesn't come up."""
    port = free_port()
    command = [sys.executable, "-m", "bench.team.serve_ingress", str(state_dir), str(port)]
    with (
        open(state_dir / "serve_ingress.log", "wb") as log,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,  # Ray's processes with it
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        try:
            if b"ready" not in process.stdout.readline():
                raise NotMeasured(f"Ray Serve did not start; {log.name} says why.")
            yield port
        finally:
            process.stdin.close()
            process.wait(STOP_S)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main() -> None:
    state_dir, port = Path(sys.argv[1]), int(sys.argv[2])
    from deployments.start.ray_cluster import prepare_environment

    prepare_environment(Config.load(None, {"state_dir": str(state_dir)}))
    import ray
    from ray import serve

    @serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0})
    class Constant:
        async def __call__(self, request: object) -> str:
            return "constant"

    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 << 20,
        _temp_dir=str(state_dir / "ray"),
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port, "location": "HeadOnly"})
        serve.run(Constant.bind(), name="constant", route_prefix="/")  # type: ignore[attr-defined]
        print("ready", flush=True)
        sys.stdin.read()
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
