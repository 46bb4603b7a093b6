"""The page's view of the cluster in a real Chromium."""

from __future__ import annotations

import time
from pathlib import Path

import httpx2 as httpx
import pytest
from selenium.webdriver.common.keys import Keys

from deployments.gateway.gateway import Gateway
from engine.text.tokenizer import Tokenizer
from protos.briolette.v1.admin_pb2 import ClusterStatus, KvStore
from tests.support.browser import Browser, needs_browser
from tests.support.gateway.fake_decoder import Decoder
from tests.support.gateway.session_cluster import running_sessions
from tests.support.gateway.stage import Stage, url
from tests.support.store.redis_servers import redis_server


@needs_browser
def test_the_cluster_view_is_updated(page: Browser, stage: Stage, gateway: Gateway) -> None:
    page.driver.get(url(gateway, "/#cluster"))
    page.wait_for("#parts", "4711")
    assert page.text("h1") == "counter"
    assert "link down" in page.text(".card:nth-of-type(3)")
    assert "group 0" in page.text(".card:nth-of-type(2)")
    stage.actor.say("b" * 250, step_s=0.03)
    body = {"model": "counter", "messages": [{"role": "user", "content": "a"}], "stream": True}
    with httpx.stream(
        "POST", url(gateway, "/v1/chat/completions"), json=body, timeout=30
    ) as pieces:
        page.wait(lambda: page.text("#numbers").startswith("Running\n1"))
        page.wait_for("#tenants", "default 1 0")
        page.wait(lambda: "default 1 0 0" not in page.text("#tenants"))  # its tokens per second
        page.wait(lambda: page.text("#map .rate").split("\n")[3] not in ("", "0/s"))
        pieces.read()
    page.wait(lambda: page.text("#numbers").startswith("Running\n0"))
    assert any(map(int, page.run(PIXELS)))
    page.run("document.getElementById('map').focus()")
    page.type(Keys.ARROW_DOWN)
    page.wait_for("#reading", "group 0")
    page.type(Keys.ARROW_DOWN, Keys.ARROW_LEFT)
    page.wait_for("#reading", "group 1, 2 s ago")


PIXELS = """
const canvas = document.querySelectorAll("#map canvas")[3];
return [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data];
"""


@needs_browser
def test_sessions_are_parked_and_deleted(
    browser: Browser, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = KvStore(address="localhost", up=True, writable=True)
    fill = Decoder._fill_status

    def fill_with_store(decoder: Decoder, status: ClusterStatus) -> None:
        fill(decoder, status)
        status.kv_store.CopyFrom(store)

    monkeypatch.setattr(Decoder, "_fill_status", fill_with_store)
    with redis_server(tmp_path) as address, running_sessions(tokenizer, address) as cluster:
        for name in ("trip", "../odd & <b>"):
            cluster.ask("Hello there, this is the beginning of it.", name)
        browser.open(url(cluster.gateway, "/#cluster"))
        browser.wait_for("#sessions", "../odd & <b>")
        assert "memory, 64 tokens" in browser.text("#sessions")
        browser.click("[aria-label^='Park trip']")
        browser.wait_for("#sessions", "Redis (parked)")
        browser.wait(lambda: not browser.all("[aria-label^='Park trip']")[0].is_enabled())
        browser.click("[aria-label='Delete ../odd & <b>']")
        assert "../odd & <b>" in browser.driver.switch_to.alert.text
        browser.driver.switch_to.alert.dismiss()
        assert len(cluster.list_all()) == 2
        browser.click("[aria-label='Delete ../odd & <b>']")
        browser.driver.switch_to.alert.accept()
        browser.wait(lambda: "odd" not in browser.text("#sessions"))
        assert [session.name for session in cluster.list_all()] == ["trip"]
        browser.wait_for("#tenants td:last-child", "B")
        assert browser.text("#tenants td:last-child") != "0 B"
        browser.run("window.fetch = () => Promise.reject(new TypeError('away'))")
        browser.click("[aria-label='Delete trip']")
        browser.driver.switch_to.alert.accept()
        browser.wait_for("#failure", "Is the cluster up?")
        time.sleep(1.5)  # it outlives the next look at the cluster
        assert browser.shows("#failure")
