"""A real Prometheus for tests: Debian's, as `scripts/prometheus` fetches it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

RULES = Path(__file__).parents[2] / "helm/briolette/alerts/briolette.yaml"


def find(name: str) -> str | None:
    """`prometheus` or `promtool`, if it is here."""
    cache = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    folder = Path(cache) / "briolette" / "prometheus"
    return shutil.which(name) or shutil.which(name, path=str(folder))


needs_prometheus = pytest.mark.skipif(
    find("prometheus") is None or find("promtool") is None,
    reason="there is no Prometheus here: scripts/prometheus says why, or fetches it",
)


class Prometheus:
    """A running server."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """An instant query: labels and value of each series."""
        data = urllib.parse.urlencode({"query": expression}).encode()
        try:
            with urllib.request.urlopen(f"{self._url}/api/v1/query", data, timeout=10) as page:
                result = json.load(page)["data"]["result"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{expression}: {error.read().decode()}") from None
        return [(series["metric"], float(series["value"][1])) for series in result]

    def is_ready(self) -> bool:
        try:
            urllib.request.urlopen(f"{self._url}/-/ready", timeout=1).close()
        except OSError:
            return False
        return True


@contextlib.contextmanager
def running_prometheus(folder: Path, targets: Path) -> Iterator[Prometheus]:
    """A server that scrapes the targets of a file twice a second and evaluates our alerts."""
    config: dict[str, Any] = {
        "global": {"scrape_interval": "500ms", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [
            {"job_name": "briolette", "file_sd_configs": [{"files": [str(targets)]}]}
        ],
    }
    file = folder / "prometheus.yml"
    file.write_text(json.dumps(config))  # which is YAML too
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    binary = find("prometheus")
    assert binary is not None
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                binary,
                f"--config.file={file}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stderr=log,
        )
    try:
        server = Prometheus(port)
        give_up_at = time.monotonic() + 20
        while not server.is_ready():
            assert process.poll() is None and time.monotonic() < give_up_at, (
                folder / "prometheus.log"
            ).read_text()
            time.sleep(0.1)
        yield server
    finally:
        process.kill()
        process.wait()
