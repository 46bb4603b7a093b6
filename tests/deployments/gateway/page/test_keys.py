"""Keys on the page in a real Chromium: nothing of one tenant is shown to another."""

from __future__ import annotations

import pytest
from selenium.webdriver.common.keys import Keys

from engine.text.tokenizer import Tokenizer
from tests.support.browser import Browser, needs_browser
from tests.support.gateway.running import running_gateway
from tests.support.gateway.stage import (
    BOBS_KEY,
    KEY,
    NOTE_REQUESTS,
    FewKeys,
    Stage,
    answer,
    ask,
    url,
)


@needs_browser
def test_a_wrong_key_then_the_right_one(
    browser: Browser, stage: Stage, tokenizer: Tokenizer
) -> None:
    with running_gateway(tokenizer, stage.find, admission=FewKeys()) as gateway:
        browser.open(url(gateway))
        browser.wait(lambda: browser.focused() == "key")
        assert not browser.shows("#chat")
        browser.type("brio_wrong", Keys.ENTER)
        browser.wait_for("#sign-in-error", "Wrong key.")
        browser.type(KEY, Keys.ENTER)
        browser.wait_for("#question")
        stage.actor.say("Welcome.")
        ask(browser, "Hello?")
        browser.wait(lambda: answer(browser) == "Welcome.")
        browser.driver.refresh()
        browser.wait_for("#question")
        assert browser.run("return localStorage.getItem('briolette.key')") is None
        browser.click("#sign-out")
        browser.wait_for("#key")
        assert not browser.shows("#chat, #views")
        assert browser.run("return sessionStorage.length") == 0


@needs_browser
def test_a_key_that_ends_and_another_after_it(
    browser: Browser, stage: Stage, tokenizer: Tokenizer
) -> None:
    keys = FewKeys()
    with running_gateway(tokenizer, stage.find, admission=keys) as gateway:
        sign_in(browser, url(gateway), KEY)
        stage.actor.say("Welcome.")
        ask(browser, "Hello?")
        browser.wait(lambda: answer(browser) == "Welcome.")
        del keys.owners[KEY]
        browser.wait_for("#sign-in-error", "valid any more")
        keys.owners["brio_new"] = "ann"
        browser.type("brio_new", Keys.ENTER)
        browser.wait_for("#messages", "Welcome.")  # back where she was
        keys.disabled.add("ann")
        browser.wait_for("#sign-in-error", "disabled")
        browser.click("#remember")
        browser.all("#key")[0].send_keys(BOBS_KEY, Keys.ENTER)
        browser.wait_for("#question")
        assert "Welcome." not in browser.text("#messages")
        assert browser.run("return localStorage.getItem('briolette.key')") == BOBS_KEY
        assert browser.run("return sessionStorage.length") == 0


@needs_browser
@pytest.mark.parametrize("remembered", [False, True])
def test_nothing_of_one_tenant_goes_out_under_the_key_of_another(
    browser: Browser, stage: Stage, tokenizer: Tokenizer, remembered: bool
) -> None:
    with running_gateway(tokenizer, stage.find, admission=FewKeys()) as gateway:
        sign_in(browser, url(gateway), KEY, remembered)
        browser.click("#settings summary")
        browser.all("#system")[0].send_keys("A secret of Ann")
        stage.actor.say("Welcome.")
        ask(browser, "Hello?")
        browser.wait(lambda: answer(browser) == "Welcome.")
        browser.all("#question")[0].send_keys("A draft of Ann")
        browser.click("#sign-out")
        browser.wait_for("#key")
        browser.wait(lambda: "Welcome." not in browser.run("return document.body.innerHTML"))
        kept = browser.run("return JSON.stringify([localStorage, sessionStorage])")
        assert ("Welcome." in kept) == remembered
        browser.type(BOBS_KEY, Keys.ENTER)
        browser.wait_for("#question")
        browser.run(NOTE_REQUESTS)
        ask(browser, "I am Bob.")
        browser.wait_for("#messages .assistant .foot")
        sent = browser.run("return window.sent.messages")
        assert sent == [{"role": "user", "content": "I am Bob."}]
        assert browser.text("#conversations li").count("\n") == 1  # its title and the button


@needs_browser
def test_signing_out_needs_no_gateway(browser: Browser, stage: Stage, tokenizer: Tokenizer) -> None:
    with running_gateway(tokenizer, stage.find, admission=FewKeys()) as gateway:
        sign_in(browser, url(gateway, "/#cluster"), KEY)
        browser.wait_for("#parts", "host0")
        browser.run("window.fetch = () => Promise.reject(new TypeError('away'))")
        browser.wait_for("#reason", "from before")
        assert browser.shows("#cluster.stale")
        browser.click("#sign-out")
        browser.wait_for("#key")
        assert not browser.shows("#chat, #cluster, #views")


def sign_in(browser: Browser, address: str, key: str, remembered: bool = False) -> None:
    browser.open(address)
    browser.wait(lambda: browser.focused() == "key")
    if remembered:
        browser.click("#remember")
    browser.all("#key")[0].send_keys(key, Keys.ENTER)
    browser.wait_for("#views")
