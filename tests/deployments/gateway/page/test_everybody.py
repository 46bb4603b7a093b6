"""The page for everybody: keyboard, contrast, phones, and nothing that is loaded from elsewhere."""

from __future__ import annotations

from pathlib import Path

import httpx2 as httpx
import pytest
from selenium.webdriver.common.keys import Keys

from deployments.gateway.gateway import Gateway
from deployments.gateway.http.page_api import PAGE_DIR
from tests.support.browser import Browser, needs_browser
from tests.support.gateway.stage import NOTE_REQUESTS, Stage, answer, ask, url


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
