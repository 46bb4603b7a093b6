"""`briolette sessions` and `briolette chat --session` against a gateway: what they print."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deployments import cli
from deployments.commands.sessions import age, size
from engine.text.tokenizer import Tokenizer
from tests.support.gateway.fake_decoder import make_tokenizer
from tests.support.gateway.session_cluster import HELLO, SessionCluster, running_sessions
from tests.support.store.redis_servers import redis_server


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture
def cluster(tokenizer: Tokenizer, tmp_path: Path) -> Iterator[SessionCluster]:
    with redis_server(tmp_path) as address, running_sessions(tokenizer, address) as made:
        yield made


@pytest.fixture
def said(cluster: SessionCluster, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command on that gateway: what it prints, in one line, or its error."""

    def run(*arguments: str) -> str:
        code = cli.main([*arguments, "--address", f"127.0.0.1:{cluster.gateway.port}"])
        captured = capsys.readouterr()
        assert (code == 0) == (captured.err == "") and "Traceback" not in captured.err
        return " ".join((captured.out + captured.err).split())

    return run


def test_from_the_first_question_to_the_deletion(
    said: Callable[..., str], cluster: SessionCluster
) -> None:
    assert "briolette chat --session NAME" in said("sessions")
    assert said("chat", "--session", "trip", "--max-tokens", "8", HELLO) == ";<=>?@AB"
    said("chat", "--session", "trip", "--max-tokens", "8", "And then?")
    cluster.blocks.flush(5)
    row = r"trip 99 [\d.]+ kB 0 s ago \d s ago memory$"
    assert re.search(row, said("sessions")), said("sessions")
    assert said("sessions", "show", "trip").startswith(f"user: {HELLO} assistant: ;<=>?@AB user:")
    assert re.match(
        r"Parked trip: \d+ B of memory are free again, [\d.]+ kB are in the store\.$",
        said("sessions", "park", "trip"),
    )
    assert said("sessions", "list").endswith("parked")
    assert re.search(
        r": of its tokens 0 were there, 96 came from the store, 3 were computed\.$",
        said("sessions", "resume", "trip"),
    )
    assert said("sessions", "delete", "trip") == "Deleted trip."
    assert "There are no sessions" in said("sessions")


def test_what_a_user_can_get_wrong(
    said: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said("chat", "--session", "trip", "--max-tokens", "8", HELLO)
    for action in ("show", "park", "resume", "delete"):
        unknown = said("sessions", action, "trap")
        assert unknown == "error: There is no session 'trap'; did you mean 'trip'?"
        assert (
            said("sessions", action)
            == f"error: The name is missing: briolette sessions {action} NAME"
        )
    assert "name has 1 to 200 bytes" in said("chat", "--session", "x" * 201, "Hi")
    assert cli.main(["sessions", "--set", f"state_dir={tmp_path}"]) == 1
    assert "Nothing is running" in capsys.readouterr().err


def test_a_conversation_says_where_it_goes_on(
    said: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def typed(*lines: str) -> None:
        left = iter(lines)

        def read(prompt: str) -> str:
            for line in left:
                return line
            raise EOFError

        monkeypatch.setattr("builtins.input", read)

    chat = ("chat", "--session", "trip", "--max-tokens", "8")
    typed(HELLO, "/new")
    first = said(*chat)
    assert "no session 'trip'. The first question begins it." in first and "/new" not in first
    assert "another --session begins another one" in first
    typed("And then?")
    second = said(*chat)
    assert "goes on after 2 messages, 65 tokens" in second and ";<=>?@AB" in second


def test_sizes_and_ages_are_short() -> None:
    sizes = [size(n) for n in (0, 999, 1000, 12_856, 999_499, 999_500, 1_450_000_000)]
    assert sizes == [
        "0 B", "999 B", "1 kB", "12.9 kB", "999 kB", "1 MB", "1.45 GB",
    ]  # fmt: skip
    ages = [age(s) for s in (-1, 59.9, 60, 3599, 3600, 86_400 * 8)]
    assert ages == ["0 s ago", "59 s ago", "1 min ago", "59 min ago", "1 h ago", "8 d ago"]
