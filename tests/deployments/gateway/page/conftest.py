"""Fixtures: a gateway whose model says what the test wants, and a browser on its page."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deployments.gateway.gateway import Gateway
from engine.text.tokenizer import Tokenizer
from tests.support.browser import Browser, running_browser
from tests.support.gateway.fake_decoder import make_tokenizer
from tests.support.gateway.running import running_gateway
from tests.support.gateway.stage import Stage, url


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="module")
def stage(tokenizer: Tokenizer) -> Iterator[Stage]:
    stage = Stage(tokenizer)
    yield stage
    stage.close()


@pytest.fixture(scope="module")
def gateway(stage: Stage, tokenizer: Tokenizer) -> Iterator[Gateway]:
    with running_gateway(tokenizer, stage.find) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with running_browser() as browser:
        yield browser


@pytest.fixture
def browser(window: Browser) -> Iterator[Browser]:
    """Complains of nothing, whatever a test does."""
    yield window
    assert window.problems() == []


@pytest.fixture
def page(browser: Browser, stage: Stage, gateway: Gateway) -> Browser:
    """Open, and ready for a question."""
    browser.open(url(gateway))
    browser.wait_for("#state", "Serving")
    return browser
