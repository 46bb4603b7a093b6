"""`briolette keys` against a gateway: what it prints, what a script gets, what can go wrong."""

from __future__ import annotations

import json
import re
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.config import Config
from cluster.errors import Unavailable
from deployments import cli
from deployments.commands import access
from deployments.gateway.admission import open_admission
from deployments.process.local_access import local_key_file
from deployments.start.lifecycle import FILE, holding
from engine.text.tokenizer import Tokenizer
from tests.support.gateway.fake_decoder import Decoder, make_tokenizer
from tests.support.gateway.running import running_gateway, serving
from tests.support.store.redis_servers import redis_server
from tests.support.waiting import wait_for


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="module")
def state_dir(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The state directory of a gateway with keys, as a supervisor would have written it."""
    state_dir = tmp_path_factory.mktemp("state")
    decoder = Decoder(tokenizer)
    with redis_server(state_dir) as address, holding(state_dir):
        settings = {"state_dir": str(state_dir), "gateway.auth": "keys", "store.url": address.url}
        config = Config.load(None, settings)
        admission = open_admission(config)
        with running_gateway(tokenizer, decoder.find, admission=admission) as gateway:
            wait_for(lambda: serving(gateway))
            running = {"pid": 1, "boot_id": "", "ray_dir": "", "model": "counter", "started": 0.0}
            running["address"] = f"127.0.0.1:{gateway.port}"
            (state_dir / FILE).write_text(json.dumps(running))
            yield state_dir
    decoder.close()


class Said(str):
    """What a command printed, errors too, in one line."""

    out: str  # on the standard output alone, as it came


@pytest.fixture
def said(
    state_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Said]:
    monkeypatch.delenv(access.KEY_VARIABLE, raising=False)
    monkeypatch.setattr(cli.console, "width", 200)

    def run(*arguments: str) -> Said:
        code = cli.main([*arguments, "--set", f"state_dir={state_dir}"])
        captured = capsys.readouterr()
        said = Said(" ".join((captured.out + captured.err).split()))
        said.out = captured.out
        assert (code == 0) == ("error:" not in said) and "Traceback" not in said
        return said

    return run


def test_from_the_first_tenant_to_its_deletion(
    said: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "make one: briolette keys create NAME" in said("keys")
    made = said("keys", "create", "ann", "--weight", "2", "--tokens-per-minute", "60000")
    key = made.out.strip()
    assert made.out == f"{key}\n" and made == f"{key} This key is never shown again."
    row = rf"ann {key.split('_')[1]} 2 60,000 - - all active$"
    assert re.search(row, said("keys", "list")), said("keys", "list")

    monkeypatch.setenv(access.KEY_VARIABLE, key)
    assert said("chat", "--max-tokens", "8", "hello") == ";<=>?@AB"
    refused = said("keys", "create", "bob")
    assert refused == "error: The tenant ann may not do this; it takes an operator's key."
    monkeypatch.delenv(access.KEY_VARIABLE)

    changed = said(
        *("keys", "set", "ann", "--max-in-flight", "4", "--kv-bytes", "2GiB", "--admin"),
        *("--models", "counter,other", "--expires", "2099-01-31", "--tokens-per-minute", "none"),
    )
    assert changed.startswith("Changed ann: tokens_per_minute, max_in_flight, kv_bytes, models")
    assert "- 4 2.15 GB counter, other admin, until 2099-01-31" in said("keys")
    assert said("keys", "create", "bob", "--key", key).startswith("brio_")

    new = said("keys", "rotate", "ann", "--grace", "1h").out.strip()
    assert said("chat", "--key", key, "--max-tokens", "8", "hello") == ";<=>?@AB"
    assert said("chat", "--key", new, "--max-tokens", "8", "hello") == ";<=>?@AB"
    assert "requests that run go on" in said("keys", "disable", "ann")
    assert said("chat", "--key", new, "hello") == "error: The tenant ann is disabled."
    assert "admin, disabled" in said("keys")
    assert said("keys", "enable", "ann") == "Enabled ann."
    said("keys", "set", "ann", "--no-admin", "--expires", "30d")
    assert re.search(r"ann \w{8} \w{8} .* until \d{4}-\d\d-\d\d", said("keys"))
    assert said("keys", "delete", "ann").startswith("Deleted ann, its sessions")
    assert "is unknown. (Give a key with --key" in said("chat", "--key", new, "hi")
    said("keys", "delete", "bob")


def test_what_a_user_can_get_wrong(said: Callable[..., Said]) -> None:
    for action in ("create", "rotate", "set", "disable", "enable", "delete"):
        which = f"error: The name is missing: briolette keys {action} NAME"
        assert said("keys", action) == which
    mistakes = {
        ("create", "no name"): "1 to 64 letters",
        ("create", "x", "--weight", "0"): "--weight: '0' is not a number above 0",
        ("create", "x", "--weight", "much"): "--weight: 'much' is not a number",
        ("create", "x", "--tokens-per-minute", "0"): "whole number from 1 to",
        ("create", "x", "--max-in-flight", "9999999999"): "whole number from 1 to",
        ("create", "x", "--kv-bytes", "plenty"): "--kv-bytes: 'plenty' is not a size",
        ("create", "x", "--kv-bytes", "1"): "--kv-bytes: 1 is not between",
        ("create", "x", "--expires", "soon"): "neither a time like 30d nor a date",
        ("create", "x", "--expires", "0001-01-01"): "",
        ("rotate", "x", "--grace", "long"): "'long' is not a time like",
        ("create", "x", "--grace", "1h"): "--grace is for rotate",
        ("disable", "x", "--weight", "2"): "Limits are set by create and set",
        ("set", "x"): "Nothing to set; for example",
        ("set", "x", "--weight", "2"): "There is no tenant 'x'",
        ("delete", "x"): "There is no tenant 'x'",
        ("list", "--key", "brio_wrong_key"): "This key is unknown.",
    }  # fmt: skip
    for arguments, words in mistakes.items():
        answer = said("keys", *arguments)
        assert answer.startswith("error:") and words in answer, arguments
    assert "There are no tenants" in said("keys")


def test_the_operators_key_is_for_its_user_and_this_machine_only(
    said: Callable[..., Said], state_dir: Path
) -> None:
    file = local_key_file(state_dir)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert said("chat", "--max-tokens", "8", "hello") == ";<=>?@AB"  # as the operator
    address = json.loads((state_dir / FILE).read_text())["address"]
    elsewhere = said("keys", "--address", address)
    assert elsewhere.startswith("error: This cluster asks for a key")
    assert "There are no tenants" in said("keys", "--address", address, "--key", file.read_text())


def test_no_key_is_shown_in_plain_text_beyond_this_machine(
    said: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    """TEST-NET-1, where nobody listens."""
    shown: list[access.Access] = []

    def take(address: str, shows: access.Access) -> None:
        shown.append(shows)
        raise Unavailable("Nobody is there.")

    monkeypatch.setattr("deployments.commands.connect.Client", take)
    for address in ("192.0.2.1:50051", "gpu.example:50051", "localhost.example:50051", "0:50051"):
        answer = said("keys", "--address", address, "--key", "brio_a_b")
        assert answer.startswith(f"error: The key would be sent to {address}"), address
        assert "--tls" in answer and "brio_a_b" not in answer and not shown
    monkeypatch.setenv(access.KEY_VARIABLE, "brio_c_d")
    assert "would be sent" in said("usage", "--address", "192.0.2.1:50051") and not shown
    for way in ("--plaintext", "--tls"):
        assert "Nobody" in said("keys", "--address", "192.0.2.1:50051", way)
    for here in ("localhost:1", "127.0.0.1:1", "[::1]:1", "unix:/x/gateway.sock"):
        assert "Nobody" in said("keys", "--address", here)
    monkeypatch.delenv(access.KEY_VARIABLE)
    assert "Nobody" in said("keys", "--address", "192.0.2.1:50051")  # no key, nothing to hide
    assert [(a.key, a.has_tls) for a in shown] == [
        ("brio_c_d", False), ("brio_c_d", True), *[("brio_c_d", False)] * 4, (None, False),
    ]  # fmt: skip


def test_files_for_tls_that_are_not_there(said: Callable[..., Said], tmp_path: Path) -> None:
    missing = tmp_path / "ca.pem"
    answer = said("keys", "--address", "127.0.0.1:1", "--tls-ca", str(missing))
    assert answer.startswith("error:") and "can't be read: No such file" in answer


def test_times_are_read_as_they_are_meant() -> None:
    from deployments.commands.key_options import PARSERS, seconds_of

    assert [seconds_of(text) for text in ("90s", "30m", "1.5h", "7d", "2w")] == [
        90, 1800, 5400, 604_800, 1_209_600,
    ]  # fmt: skip
    assert PARSERS["expires"]("1d") == pytest.approx(time.time() + 86400, abs=5)
