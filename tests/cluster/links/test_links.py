"""Links: whole messages over every transport, honest handshakes, timeouts, nothing left behind."""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import random
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.errors import LinkError, LinkRefused, LinkTimeout, PortTaken
from cluster.links import shared_memory
from cluster.links.connect import (
    Endpoint,
    Link,
    Listener,
    connect,
)
from cluster.links.handshake import TRANSPORTS
from cluster.links.link import HEADER, MARK

SECRET = b"between us"
every_transport = pytest.mark.parametrize("transport", TRANSPORTS)


def say_welcome(hello: bytes) -> bytes:
    if hello == b"stranger":
        raise LinkError("Strangers stay outside.")
    return b"welcome " + hello


@contextlib.contextmanager
def linked(transport: str) -> Iterator[tuple[Link, Link]]:
    """(connector's end, acceptor's end) of one link."""
    listener = Listener(SECRET, say_welcome)
    accepted: list[Link] = []
    thread = threading.Thread(target=lambda: accepted.append(listener.accept(5)))
    thread.start()
    near = connect(listener.endpoint, SECRET, b"friend", 5, [transport])
    thread.join()
    listener.close()
    with near, accepted[0] as far:
        yield near, far


@every_transport
def test_messages_arrive_whole_and_in_order(transport: str) -> None:
    noise = random.Random(0)
    messages = [noise.randbytes(size) for size in (0, 1, 8, 5600, 64_000, 131_072, 3, 0)]
    with linked(transport) as (near, far):
        assert (near.kind, far.kind) == (transport, transport)
        assert (near.hello, far.hello) == (b"welcome friend", b"friend")
        for message in messages[:5]:
            near.send([message[:3], message[3:]], 5)
        for message in messages[5:]:
            far.send([memoryview(message)], 5)
        assert [bytes(far.recv(5)) for _ in range(5)] == messages[:5]
        assert [bytes(near.recv(5)) for _ in range(3)] == messages[5:]


@every_transport
def test_two_peers_that_both_send_long_messages_never_wait_for_each_other(transport: str) -> None:
    message = random.Random(1).randbytes(5 * shared_memory.RING_BYTES + 7)
    with linked(transport) as (near, far):
        received: list[memoryview] = []

        def swap(link: Link) -> None:
            link.send([message], 10)
            received.append(link.recv(10))

        other = threading.Thread(target=swap, args=(far,))
        other.start()
        swap(near)
        other.join()
        assert [bytes(each) == message for each in received] == [True, True]


@every_transport
def test_one_thread_sends_while_another_receives(transport: str) -> None:
    message, rounds = bytes(300_000), 20
    with linked(transport) as (near, far):

        def echo() -> None:
            for _ in range(rounds):
                far.send([far.recv(10)], 10)

        def send() -> None:
            for _ in range(rounds):
                near.send([message], 10)

        threads = [threading.Thread(target=target) for target in (echo, send)]
        for thread in threads:
            thread.start()
        assert all(bytes(near.recv(10)) == message for _ in range(rounds))
        for thread in threads:
            thread.join()


@every_transport
def test_silence_is_a_timeout_and_the_link_lives_on(transport: str) -> None:
    with linked(transport) as (near, far):
        for timeout_s in (0, 0.02):
            with pytest.raises(LinkTimeout):
                near.recv(timeout_s)
        far.send([b"late"])
        assert bytes(near.recv(1)) == b"late"


@every_transport
def test_a_send_waits_for_a_busy_peer_that_gives_signs_of_life(transport: str) -> None:
    message = bytes(8 << 20)
    with linked(transport) as (near, far):

        def compute() -> None:
            for _ in range(8):
                time.sleep(0.1)
                far.send([b"still busy"])

        thread = threading.Thread(target=compute)
        thread.start()
        reader = threading.Timer(0.8, far.recv, [5])
        reader.start()
        near.send([message], 0.3)
        thread.join()
        reader.join()
        assert [bytes(near.recv(1)) for _ in range(8)] == [b"still busy"] * 8


@every_transport
def test_spinning_finds_what_comes(transport: str) -> None:
    with linked(transport) as (near, far):
        pipe = near.pipe
        assert not pipe.spin(0.001)
        timer = threading.Timer(0.02, far.send, [[b"x"]])
        timer.start()
        start = time.monotonic()
        assert pipe.spin(5.0)
        assert time.monotonic() - start < 1
        assert bytes(near.recv(1)) == b"x"
        timer.join()


@every_transport
def test_a_peer_that_never_reads_is_an_error_in_time(transport: str) -> None:
    with linked(transport) as (near, _):
        start = time.monotonic()
        with pytest.raises(LinkError, match="timeout"):
            near.send([bytes(64 << 20)], 0.1)
        assert time.monotonic() - start < 1
        with pytest.raises(LinkError):
            near.send([b"more"])


@every_transport
def test_what_was_sent_before_the_end_still_arrives(transport: str) -> None:
    with linked(transport) as (near, far):
        far.send([b"last words"])
        far.close()
        assert bytes(near.recv(1)) == b"last words"
        with pytest.raises(LinkError, match="closed"):
            near.recv(1)
        far.close()  # a second close does nothing


@every_transport
def test_close_frees_a_thread_that_receives(transport: str) -> None:
    with linked(transport) as (near, _):
        caught: list[LinkError] = []

        def receive() -> None:
            try:
                near.recv(None)
            except LinkError as error:
                caught.append(error)

        thread = threading.Thread(target=receive)
        thread.start()
        time.sleep(0.05)
        near.close()
        thread.join(2)
        assert caught


@every_transport
def test_the_timeout_is_for_silence_not_for_a_long_message(transport: str) -> None:
    message = os.urandom(6000)
    with linked(transport) as (near, far):
        frame = memoryview(HEADER.pack(MARK, len(message)) + message)

        def dribble() -> None:
            for start in range(0, len(frame), 1000):
                far.pipe.write([frame[start : start + 1000]])
                time.sleep(0.1)

        thread = threading.Thread(target=dribble)
        thread.start()
        assert bytes(near.recv(0.4)) == message
        thread.join()


def test_memory_that_cannot_be_mapped_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no memory")

    before = len(os.listdir("/proc/self/fd"))
    near, far = socket.socketpair()
    monkeypatch.setattr("mmap.mmap", fail)
    with pytest.raises(LinkError, match="no memory"):
        shared_memory.SharedMemoryPipe(near, shared_memory.create_shared_fds(), is_acceptor=True)
    far.close()
    assert len(os.listdir("/proc/self/fd")) == before


def echo_until_killed(pipe: object) -> None:
    listener = Listener(SECRET, say_welcome)
    pipe.send(listener.endpoint.to_dict())  # type: ignore[attr-defined]
    with listener.accept(10) as link:
        while True:
            link.send([link.recv(None)])


@every_transport
def test_a_kill_shows_at_once(transport: str) -> None:
    context = multiprocessing.get_context("forkserver")
    near_pipe, far_pipe = context.Pipe()
    process = context.Process(target=echo_until_killed, args=(far_pipe,), daemon=True)
    process.start()
    endpoint = Endpoint.from_dict(near_pipe.recv())
    with connect(endpoint, SECRET, b"friend", 5, [transport]) as link:
        link.send([b"ping"])
        assert bytes(link.recv(5)) == b"ping"
        timer = threading.Timer(0.05, os.kill, (process.pid, signal.SIGKILL))
        start = time.monotonic()
        timer.start()
        with pytest.raises(LinkError, match="closed"):
            link.recv(10)
        assert time.monotonic() - start < 1
    process.join()


# -- the handshake --


@contextlib.contextmanager
def serving(listener: Listener) -> Iterator[list[Link]]:
    """Accept in the background until the block ends."""
    links: list[Link] = []

    def serve() -> None:
        with contextlib.suppress(LinkError):
            while True:
                links.append(listener.accept())

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield links
    finally:
        listener.close()
        thread.join(6)
        for link in links:
            link.close()


@every_transport
def test_refusals_carry_the_reason(transport: str) -> None:
    listener = Listener(SECRET, say_welcome)
    with serving(listener) as links:
        with pytest.raises(LinkRefused, match="Strangers stay outside"):
            connect(listener.endpoint, SECRET, b"stranger", 5, [transport])
        with pytest.raises(LinkRefused, match="secret"):
            connect(listener.endpoint, b"guess", b"friend", 5, [transport])
        assert not links


def test_transport_falls_back_where_a_handshake_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    listener = Listener(SECRET, say_welcome)
    with serving(listener):
        real = listener.endpoint
        with connect(real, SECRET, b"friend") as link:
            assert link.kind == "shm"
        elsewhere = Endpoint(real.host, real.port, "briolette-on-another-machine")
        with connect(elsewhere, SECRET, b"friend") as link:
            assert link.kind == "tcp"
        monkeypatch.setattr(Listener, "_share_memory", fail_to_share)
        with connect(real, SECRET, b"friend") as link:
            assert link.kind == "unix"
    with pytest.raises(LinkError, match="tcp: "):
        connect(listener.endpoint, SECRET, b"friend", 1)


def fail_to_share(_: Listener, sock: socket.socket) -> None:
    sock.sendall(b"N")
    raise LinkError("no memory")


@pytest.mark.parametrize("noise", [b"", b"GET / HTTP/1.1\r\n\r\n" * 10, bytes(200)])
def test_a_stranger_costs_little_and_stops_nobody(noise: bytes) -> None:
    listener = Listener(SECRET, say_welcome)
    with socket.create_connection((listener.endpoint.host, listener.endpoint.port)) as stranger:
        stranger.sendall(noise)
        sock = listener.accept_socket(1)
        with pytest.raises(LinkError):
            listener.welcome(sock, 0.05)
    listener.close()


@pytest.mark.parametrize("mark", [b"\0\0\0\0", b"BLNK"])
def test_garbage_after_the_handshake_is_an_error(mark: bytes) -> None:
    with linked("tcp") as (near, far):
        near.pipe.write([memoryview(mark + b"\xff\xff\xff\xff" + bytes(100))])
        with pytest.raises(LinkError, match="not a message"):
            far.recv(1)


def test_a_peer_that_corrupts_the_counters_is_an_error() -> None:
    fds, (sock, peer) = shared_memory.create_shared_fds(), socket.socketpair()
    with mmap.mmap(fds[0], 0) as memory, peer:
        words = memoryview(memory).cast("Q")
        with Link(shared_memory.SharedMemoryPipe(sock, fds, is_acceptor=True), b"") as link:
            words[len(words) // 2 + shared_memory.HEAD] = 1 << 60
            with pytest.raises(LinkError, match="out of range"):
                link.recv(1)
            words[shared_memory.TAIL] = 1 << 60
            with pytest.raises(LinkError, match="out of range"):
                link.send([b"x"])
        words.release()


def accept_with_few_files(control: Any, num_files: int) -> None:
    """Accept links in a process that may open `num_files` files beside its listener, and as many
    as it likes once `control` says so.
    """
    listener = Listener(SECRET, say_welcome)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(map(int, os.listdir("/proc/self/fd")))
    holes = [os.open("/dev/null", os.O_RDONLY) for _ in range(used)]  # below the highest, if any
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(holes) + 1, hard))
    for fd in holes[:num_files]:
        os.close(fd)
    with serving(listener):
        control.send(listener.endpoint.to_dict())
        control.recv()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        control.send("more")
        with contextlib.suppress(EOFError):
            control.recv()


@pytest.mark.parametrize(("num_files", "kind"), [(0, None), (1, "unix")])
def test_a_listener_out_of_files_says_so_and_recovers(num_files: int, kind: str | None) -> None:
    context = multiprocessing.get_context("forkserver")
    control, far = context.Pipe()
    process = context.Process(target=accept_with_few_files, args=(far, num_files), daemon=True)
    process.start()
    far.close()
    endpoint = Endpoint.from_dict(control.recv())
    if kind is None:
        for _ in range(3):
            with pytest.raises(LinkRefused, match="its limit of open files"):
                connect(endpoint, SECRET, b"friend", 5)
    else:  # a file for the socket, none for shared memory
        with connect(endpoint, SECRET, b"friend", 5) as link:
            assert link.kind == kind
    control.send("more")
    control.recv()
    with connect(endpoint, SECRET, b"friend", 5) as link:
        assert link.kind == "shm"
    control.close()
    process.join(10)


def test_a_taken_port_is_named() -> None:
    listener = Listener(SECRET, say_welcome)
    with pytest.raises(PortTaken, match=str(listener.endpoint.port)):
        Listener(SECRET, say_welcome, port=listener.endpoint.port)
    listener.close()


@every_transport
def test_nothing_is_left_open(transport: str) -> None:
    def num_fds() -> int:
        return len(os.listdir("/proc/self/fd"))

    with linked(transport):
        pass
    before = num_fds()
    for _ in range(5):
        with linked(transport) as (near, far):
            near.send([b"x"])
            far.recv(1)
    assert num_fds() == before
    with open("/proc/self/maps") as maps:
        assert "briolette-link" not in maps.read()
