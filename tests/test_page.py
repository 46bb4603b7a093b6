"""The page in a real Chromium, on a gateway whose model says what the test wants."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import numpy as np
import pytest
import torch
from selenium.webdriver.common.keys import Keys
from torch import Tensor

from cluster.errors import PermissionDenied, Unauthenticated
from cluster.placement import ExpertGroups
from cluster.tenancy import Lease, OpenLease, Tenant
from cluster.usage import UsageBooks
from deployments.calls.call import Call
from deployments.calls.usage import UsageService
from deployments.decoding.tenant_loads import TenantLoads
from deployments.gateway import Gateway
from deployments.http.page_api import PAGE_DIR, to_json
from deployments.messages import to_group_load
from deployments.services.admin import Admin
from engine.batch import Batch
from engine.request import Request, RequestState, SamplingParams
from engine.tokenizer import Tokenizer
from experts.load import ExpertLoad
from protos.briolette.v1.admin_pb2 import (
    ClusterStatus,
    ExpertHost,
    GetStatusRequest,
    GroupLoad,
    KvStore,
    Part,
    TenantLoad,
)
from protos.briolette.v1.sessions_pb2 import Session
from tests.browser import Browser, needs_browser, running_browser
from tests.redis_servers import redis_server
from tests.test_gateway import CountingRunner, Decoder, make_tokenizer, running_gateway
from tests.test_session_service import running

END = 0  # the token that ends an answer
KEY, BOBS_KEY = "brio_right", "brio_bobs"


class Actor(CountingRunner):
    """Says its lines, whatever it is asked; one answer at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.line = b""
        self._said = 0

    def say(self, text: str, step_s: float = 0.0) -> None:
        self.line, self._said, self.step_s = text.encode(), 0, step_s

    def execute(self, batch: Batch) -> Tensor:
        super().execute(batch)
        token = self.line[self._said] if self._said < len(self.line) else END
        self._said += len(batch.logits_indices)
        return torch.nn.functional.one_hot(torch.tensor([token]), 256).float() * 50


class Stage(Decoder):
    """A decoder whose model is an actor, with two expert hosts that only the status knows."""

    takes_images = False

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.actor = Actor()
        super().__init__(tokenizer, runner=self.actor, eos_ids=(END,))

    def _fill_status(self, status: ClusterStatus) -> None:
        super()._fill_status(status)
        status.decoder.CopyFrom(Part(pid=4711, device="cpu", kernels="native"))
        for host_id, groups, link in (("host0", [0, 2], "shm"), ("host1", [1, 3], "")):
            part = Part(pid=5000, device="cuda:0")
            host = ExpertHost(host_id=host_id, part=part, group_ids=groups, link=link)
            status.expert_hosts.append(host)
        for group_id in range(4):
            choices = (group_id + 1) * self.engine.stats().num_decode_tokens
            status.group_load.append(GroupLoad(group_id=group_id, choices=choices))
        status.takes_images = self.takes_images


class FewKeys:
    """Tenants by their keys; who is disabled is refused."""

    def __init__(self) -> None:
        self.tenants = {KEY: "ann", BOBS_KEY: "bob"}
        self.disabled: set[str] = set()

    def admit(self, key: str | None) -> Lease:
        tenant = self.tenants.get(key or "")
        if tenant is None:
            raise Unauthenticated("This cluster asks for a key.")
        if tenant in self.disabled:
            raise PermissionDenied("The tenant is disabled.")
        return OpenLease(Tenant(tenant, is_admin=False))


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


def url(gateway: Gateway, path: str = "/") -> str:
    return f"http://127.0.0.1:{gateway.http_port}{path}"


def ask(page: Browser, question: str) -> None:
    page.wait_for("#question")
    page.all("#question")[0].send_keys(question, Keys.ENTER)


def answer(page: Browser) -> str:
    return page.text("#messages .assistant .prose")


# The chat


@needs_browser
def test_a_chat_to_its_end(page: Browser, stage: Stage) -> None:
    stage.actor.say("# Lists\n\nUse **sorted**:\n\n- one\n- two\n\n```python\nsorted(x)\n```\n")
    ask(page, "How do I sort?")
    page.wait_for("#messages .assistant .foot", "tokens")
    assert page.text("#messages .user") == "How do I sort?"
    for tag, words in (
        ("h2", "Lists"),
        ("strong", "sorted"),
        ("li", "one\ntwo"),
        ("pre", "sorted(x)"),
    ):
        assert page.text(f"#messages .assistant {tag}") == words
    assert "tokens/s · first after" in page.text(".foot")
    assert page.focused() == "question"
    stage.actor.say("Yes.")
    ask(page, "Is it stable?")
    page.wait(lambda: answer(page).endswith("Yes."))
    page.driver.refresh()
    page.click("#conversations li button")  # it is kept
    page.wait(lambda: answer(page).endswith("Yes."))
    page.click("#new-chat")
    assert not page.shows("#messages article")


@needs_browser
@pytest.mark.parametrize("how", ["escape", "button", "leaving"])
def test_a_stop_ends_the_request_in_the_engine(page: Browser, stage: Stage, how: str) -> None:
    stage.actor.say("and so on " * 40, step_s=0.05)
    ask(page, "Tell me a long story.")
    page.wait(lambda: "and so on" in answer(page))
    if how == "escape":
        page.type(Keys.ESCAPE)
    elif how == "button":
        page.click("#stop")
    else:
        page.driver.get("about:blank")
    page.wait(lambda: not stage.engine.has_work, seconds=2.0)
    num_steps = stage.actor.num_steps
    time.sleep(0.2)
    assert stage.actor.num_steps == num_steps
    if how != "leaving":
        page.wait_for(".foot", "stopped")
        assert page.shows("#send") and not page.shows("#stop")
        assert len(answer(page)) < 400


@needs_browser
def test_what_goes_wrong_is_told_and_can_be_tried_again(page: Browser, stage: Stage) -> None:
    ask(page, "x" * 600)
    page.wait_for("#messages .error", "the context holds 512")
    stage.actor.say("Short.")
    page.run(NOTE_REQUESTS)
    ask(page, "And this?")
    page.wait(lambda: answer(page) == "Short.")
    assert page.run("return window.sent.messages") == [{"role": "user", "content": "And this?"}]
    page.click("#new-chat")
    stage.actor.error = RuntimeError("The card is on fire.")
    ask(page, "Hello?")
    page.wait_for("#messages .error", "The card is on fire.")
    stage.actor.error = None
    stage.actor.say("Hello.")
    page.click("#messages .error button")
    page.wait(lambda: answer(page) == "Hello.")
    assert not page.shows("#messages .error")


@needs_browser
def test_markup_in_an_answer_stays_text(page: Browser, stage: Stage) -> None:
    evil = (
        '<img src=x onerror="window.evil=1"> <script>window.evil=1</script> '
        "[a](javascript:window.evil=1) [b](data:text/html,x) <svg onload=alert(1)> "
        "`<b>` **<i>bold</i>** [good](https://example.org/a_b) https://example.org/c_d."
    )
    stage.actor.say(evil)
    ask(page, "<b>Attack</b>")
    page.wait_for(".foot", "tokens")
    assert page.text(".said") == "<b>Attack</b>"
    assert '<img src=x onerror="window.evil=1"> <script>' in answer(page)
    assert "[a](javascript:window.evil=1) [b](data:text/html,x)" in answer(page)
    assert page.text(".assistant .prose strong") == "<i>bold</i>"
    assert page.all(".prose :is(img, script, svg, b, i)") == []
    links = [link.get_attribute("href") for link in page.all(".prose a")]
    assert links == ["https://example.org/a_b", "https://example.org/c_d"]
    assert all("noopener" in (link.get_attribute("rel") or "") for link in page.all(".prose a"))
    assert page.run("return window.evil") is None


MARKDOWN = [
    ("a\n\nb", "<p>a</p><p>b</p>"),
    (
        "1. x\n   - y\n   - z\n2. w",
        "<ol start=1><li>x<ul><li>y</li><li>z</li></ul></li><li>w</li></ol>",
    ),
    ("- a\n\n  b\n- c", "<ul><li>a<p>b</p></li><li>c</li></ul>"),
    ("  - a\n  - b", "<ul><li>a</li><li>b</li></ul>"),
    ("> a\n> - b", "<blockquote><p>a</p><ul><li>b</li></ul></blockquote>"),
    ("snake_case_name and 2 * 3 * 4", "<p>snake_case_name and 2 * 3 * 4</p>"),
    ("*a* **b *c*** `d*e*`", "<p><em>a</em> <strong>b <em>c</em></strong> <code>d*e*</code></p>"),
    (r"\*a\* \`b\`", "<p>*a* `b`</p>"),
    ("a **b", "<p>a **b</p>"),
    ("---", "<hr>"),
    ("###### six ##", "<h6>six</h6>"),
    ("#hash", "<p>#hash</p>"),
    ("a | b\n--|--:\n1 | `x\\|y`", None),
]


@needs_browser
def test_markdown(page: Browser) -> None:
    show = (
        "const [text, done] = arguments;"
        "import('/page/markdown.js').then(({ showMarkdown }) => {"
        "  const node = document.createElement('div');"
        "  for (let end = 0; end <= text.length; end++) showMarkdown(node, text.slice(0, end));"
        "  done(node.innerHTML.replaceAll('\"', ''));"
        "});"
    )
    for text, expected in MARKDOWN:
        shown = page.driver.execute_async_script(show, text)
        if expected is None:
            assert "<th class=left>a</th>" in shown and "<code>x|y</code>" in shown
        else:
            assert shown == expected
    deep = page.driver.execute_async_script(show, ">" * 300 + " x")
    assert deep.count("<blockquote") < 20
    started = time.monotonic()
    for unclosed in ("**a " * 8000, "`" * 20_000, "[" * 20_000, "_a " * 10_000, "- " * 2000):
        page.driver.execute_async_script(show.replace("end = 0", "end = text.length"), unclosed)
    assert time.monotonic() - started < 10


# Keys


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
        del keys.tenants[KEY]
        browser.wait_for("#sign-in-error", "valid any more")
        keys.tenants["brio_new"] = "ann"
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


# The cluster


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
    with redis_server(tmp_path) as address, running(tokenizer, address) as cluster:
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
        assert len(cluster.list()) == 2
        browser.click("[aria-label='Delete ../odd & <b>']")
        browser.driver.switch_to.alert.accept()
        browser.wait(lambda: "odd" not in browser.text("#sessions"))
        assert [session.name for session in cluster.list()] == ["trip"]
        browser.wait_for("#tenants td:last-child", "B")
        assert browser.text("#tenants td:last-child") != "0 B"
        browser.run("window.fetch = () => Promise.reject(new TypeError('away'))")
        browser.click("[aria-label='Delete trip']")
        browser.driver.switch_to.alert.accept()
        browser.wait_for("#failure", "Is the cluster up?")
        time.sleep(1.5)  # it outlives the next look at the cluster
        assert browser.shows("#failure")


# For everybody


@needs_browser
def test_by_keyboard_alone(page: Browser, stage: Stage, gateway: Gateway) -> None:
    stage.actor.say("By keyboard.")
    page.type("Hello?")
    page.type_with(Keys.SHIFT, Keys.ENTER)
    page.type("Are you there?", Keys.ENTER)
    page.wait(lambda: answer(page) == "By keyboard.")
    assert page.text(".said") == "Hello?\nAre you there?"
    page.run("document.querySelector('.skip').focus()")
    seen = [page.focused()]
    while seen[-1] != "send" and len(seen) < 20:
        page.type(Keys.TAB)
        seen.append(page.focused())
        assert page.run(OUTLINE), seen[-1]
    stations = ["Chat", "Cluster", "theme", "new-chat", "messages", "question", "send"]
    assert [name for name in seen if name in stations] == stations
    page.run("document.querySelector('nav a[href=\"#cluster\"]').focus()")
    page.type(Keys.ENTER)
    page.wait_for("#parts", "host0")


OUTLINE = "return getComputedStyle(document.activeElement).outlineStyle !== 'none'"


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_both_themes_can_be_read(page: Browser, stage: Stage, gateway: Gateway, dark: bool) -> None:
    page.open(url(gateway), dark=dark)
    page.wait_for("#state", "Serving")
    stage.actor.say("Some **text** with `code`, [a link](https://example.org)\n\n> and a quote")
    ask(page, "Hello?")
    page.wait_for(".foot", "tokens")
    is_dark = "return getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0] < 128"
    assert page.run(is_dark) == dark
    assert page.run(FAINT) == []
    page.driver.get(url(gateway, "/#cluster"))
    page.wait_for("#parts", "host0")
    assert page.run(FAINT) == []
    for theme in ("light", "dark", "auto"):
        page.click("#theme")
        assert page.text("#theme") == f"Theme: {theme}"
        assert page.run(is_dark) == (dark if theme == "auto" else theme == "dark")


# Texts with a contrast below WCAG's AA, by its formula.
FAINT = """
const parse = (color) => color.match(/[\\d.]+/g).map(Number);
const light = (rgb) => rgb.slice(0, 3).map((v) => v / 255)
  .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
function behind(node) {
  for (; node; node = node.parentElement) {
    const color = parse(getComputedStyle(node).backgroundColor);
    if (color.length < 4 || color[3] === 1) return color;
  }
}
const faint = [];
for (const node of document.querySelectorAll("body *")) {
  const isText = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
  if (!isText || !node.checkVisibility() || node.disabled) continue;
  const lights = [parse(getComputedStyle(node).color), behind(node)].map(light);
  if ((Math.max(...lights) + 0.05) / (Math.min(...lights) + 0.05) < 4.5) faint.push(node.outerHTML);
}
return faint;
"""


@needs_browser
def test_on_a_phone_nothing_is_cut_off(page: Browser, stage: Stage, gateway: Gateway) -> None:
    page.open(url(gateway), width=390)
    page.wait_for("#state", "Serving")
    stage.actor.say("```\n" + "long " * 40 + "\n```\n" + "w" * 100)
    ask(page, "Hello?")
    page.wait_for(".foot", "tokens")
    too_wide = "return document.documentElement.scrollWidth - innerWidth"
    assert page.run(too_wide) <= 0
    page.click("nav a[href='#cluster']")
    page.wait_for("#parts", "host0")
    assert page.run(too_wide) <= 0


@needs_browser
def test_images_are_offered_only_where_the_model_takes_them(
    page: Browser, stage: Stage, tmp_path: Path
) -> None:
    assert not page.shows("#attach")
    stage.takes_images = True
    try:
        page.wait_for("#attach")
        picture = tmp_path / "dot.png"
        picture.write_bytes(PNG)
        page.all("#image")[0].send_keys(str(picture))
        page.wait_for("#images img")
        page.run(NOTE_REQUESTS)
        ask(page, "What is this?")
        page.wait_for(".user .images img")
        (image, text) = page.run("return window.sent.messages[0].content")
        assert image["image_url"]["url"].startswith("data:image/png;base64,")
        assert text == {"type": "text", "text": "What is this?"}
        page.wait_for(".assistant .error")  # this gateway itself takes none
        page.driver.refresh()
        page.click("#conversations li button")
        page.wait_for(".user .foot", "an image, not kept")
    finally:
        stage.takes_images = False


PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360606060"
    "000000050001a5f645400000000049454e44ae426082"
)
NOTE_REQUESTS = """
const send = window.fetch;
window.fetch = (path, options) => {
  if (options?.body) window.sent = JSON.parse(options.body);
  return send(path, options);
};
"""


@needs_browser
def test_it_asks_nobody_else(page: Browser, gateway: Gateway) -> None:
    page.driver.get(url(gateway, "/#cluster"))
    page.wait_for("#parts", "host0")
    asked = page.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert asked and all(name.startswith(url(gateway)) for name in asked)
    page.wait_for("#no-sessions", "it has no store")
    assert not any("api/sessions" in name for name in asked)


def test_it_is_small_and_strict(gateway: Gateway) -> None:
    assert sum(path.stat().st_size for path in PAGE_DIR.iterdir()) <= 64 << 10
    for path in ("/", "/page/main.js", "/page/style.css", "/page/gem.svg"):
        answer = httpx.get(url(gateway, path))
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert (
            policy.startswith("default-src 'none'; script-src 'self';") and "unsafe" not in policy
        )
        again = httpx.get(url(gateway, path), headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    for path in ("/page/nothing.js", "/page/..%2fpage_api.py", "/page/"):
        assert httpx.get(url(gateway, path)).status_code == 404


# Its JSON


def test_json_has_all_fields_and_numbers_that_are_numbers() -> None:
    status = to_json(ClusterStatus(group_load=[GroupLoad(group_id=1, choices=2**40)]))
    assert status["group_load"] == [{"group_id": 1, "choices": 2**40}]
    assert status["load"]["kv_blocks"] == [] and status["decoder"]["pid"] == 0
    assert to_json(Session(name="a"))["tokens_in_memory"] is None
    assert to_json(Session(name="a", tokens_in_memory=0))["tokens_in_memory"] == 0


def test_the_heat_of_a_group_is_that_of_its_experts_in_all_layers() -> None:
    load = ExpertLoad(num_layers=2, num_experts=5)
    load.count(0, np.array([0, 1, 4]))
    load.count(1, np.array([4, 4]))
    groups = to_group_load(load, ExpertGroups(5, 2))
    assert [(group.group_id, group.choices) for group in groups] == [(0, 2), (1, 3)]


def test_only_an_operator_sees_other_tenants() -> None:
    status = ClusterStatus(tenants=[TenantLoad(tenant="ann"), TenantLoad(tenant="bob")])
    admin = Admin(lambda: status, None, UsageService(UsageBooks(None)))
    calls = [Call(OpenLease(tenant)) for tenant in (Tenant("op", is_admin=True), Tenant("bob"))]
    whole, own = [asyncio.run(admin.get_status(GetStatusRequest(), call)) for call in calls]
    assert whole == status
    assert [load.tenant for load in own.tenants] == ["bob"]
    assert len(status.tenants) == 2


def test_what_a_tenant_asks_for_is_counted() -> None:
    loads = TenantLoads(lambda request: 100 if request.state is RequestState.RUNNING else 0)
    requests = [
        Request(str(i), [1] * 10, SamplingParams(), 0, max_tokens=9, tenant=tenant)
        for i, tenant in enumerate(("bob", "ann", "ann"))
    ]
    for request in requests:
        loads.accepted(request)
    requests[1].state = RequestState.RUNNING
    requests[2].state = RequestState.WAITING_FOR_BLOCKS
    loads.generated(requests[1], 7)
    ann, bob = loads.of(requests)
    assert (ann.tenant, ann.num_running, ann.num_waiting) == ("ann", 1, 1)
    assert (ann.prompt_tokens, ann.output_tokens, ann.kv_bytes) == (20, 7, 100)
    assert (bob.num_running, bob.num_waiting, bob.prompt_tokens, bob.kv_bytes) == (0, 1, 10, 0)
    assert [load.num_running for load in loads.of([])] == [0, 0]
