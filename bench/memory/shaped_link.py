"""A network link of a given rate between this process and a server that it starts.

Two network namespaces (`unshare`), a veth pair between them, and a token bucket (`tc tbf`) at both
of its ends. Namespaces and link belong to the processes in them alone: they are gone when those
have ended, however they ended, and nothing else on the machine sees them.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.lib.peers import NotMeasured

NEAR, FAR = "10.81.0.1", "10.81.0.2"  # in namespaces where there is no other network
LINK = "shaped0"  # at both ends
BURST_BYTES = 512 << 10  # more than a kernel's tick brings
QUEUE_MS = 50
START_S = 5.0
_ENTERED = "BRIOLETTE_BENCH_NETWORK"  # in the environment of who is in a namespace of its own


def enter() -> None:
    """Begin this program anew in a network namespace of its own, unless it is in one.

    Where that isn't allowed it returns, and `far_server` raises NotMeasured. Without root a user
    namespace is made as well.
    """
    if _ENTERED in os.environ:
        return
    unshare = ["unshare", "--net", *(() if os.geteuid() == 0 else ("--map-root-user",))]
    try:
        subprocess.run([*unshare, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return
    module = sys.modules["__main__"].__spec__
    assert module is not None, "run it as python -m"
    command = [*unshare, sys.executable, "-m", module.name, *sys.argv[1:]]
    os.execvpe(command[0], command, {**os.environ, _ENTERED: "own"})


@contextlib.contextmanager
def far_server(command: Sequence[str]) -> Iterator[int]:
    """A server on the other side of a link that isn't shaped yet, at the address FAR; gives its
    process id for `shape`. It must listen on all addresses of its namespace, which has no others.

    Raises NotMeasured where this machine lets us make no namespaces or no link.
    """
    if _ENTERED not in os.environ:
        raise NotMeasured("network namespaces are not allowed here (unshare --net)")
    process = subprocess.Popen(["unshare", "--net", *command], stdout=subprocess.DEVNULL)
    try:
        _wait_for_namespace(process)
        far = ["nsenter", "--target", str(process.pid), "--net"]
        peer = ("peer", "name", LINK, "netns", str(process.pid))
        _call("ip", "link", "add", "name", LINK, "type", "veth", *peer)
        for side, address in (([], NEAR), (far, FAR)):
            _call(*side, "ip", "address", "add", f"{address}/24", "dev", LINK)
            _call(*side, "ip", "link", "set", LINK, "up")
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def shape(pid: int, bits_per_s: float) -> None:
    """Let no more than this pass in each direction. Raises NotMeasured where `tc` can't."""
    for side in ([], ["nsenter", "--target", str(pid), "--net"]):
        bucket = ("rate", f"{bits_per_s:.0f}bit", "burst", str(BURST_BYTES))
        latency = ("latency", f"{QUEUE_MS}ms")
        _call(*side, "tc", "qdisc", "replace", "dev", LINK, "root", "tbf", *bucket, *latency)


def _wait_for_namespace(process: subprocess.Popen[bytes]) -> None:
    """Until the process has left our namespace."""
    ours, give_up_at = os.readlink("/proc/self/ns/net"), time.monotonic() + START_S
    theirs = Path(f"/proc/{process.pid}/ns/net")
    while process.poll() is None and time.monotonic() < give_up_at:
        with contextlib.suppress(OSError):
            if os.readlink(theirs) != ours:
                return
        time.sleep(0.01)
    raise NotMeasured("the server in a second network namespace didn't start")


def _call(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise NotMeasured(f"{command[0]} is not installed") from None
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip() or f"status {error.returncode}"
        raise NotMeasured(f"`{' '.join(command)}` failed: {reason}") from None
