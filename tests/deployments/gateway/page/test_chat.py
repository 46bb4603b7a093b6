"""The chat in a real Chromium."""

from __future__ import annotations

import time

import pytest
from selenium.webdriver.common.keys import Keys

from tests.support.browser import Browser, needs_browser
from tests.support.gateway.stage import NOTE_REQUESTS, Stage, answer, ask


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
