"""A headless Chromium for tests, driven by its own driver over a local port."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from tests.support.waiting import wait_for

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="needs a browser (Debian: apt-get install chromium chromium-driver)",
)


class Browser:
    """One window. What can be seen is asked for by CSS selectors."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str, *, width: int = 1280, dark: bool = False) -> None:
        """A page as a new visitor gets it."""
        self.command("Storage.clearDataForOrigin", origin=url, storageTypes="all")
        size = {"width": width, "height": 860, "deviceScaleFactor": 1, "mobile": False}
        self.command("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", features=[scheme])
        self.driver.get("about:blank")  # else a change of the fragment wouldn't load it anew
        self.driver.get(url)

    def command(self, name: str, **parameters: Any) -> None:
        """One of the DevTools protocol."""
        self.driver.execute_cdp_cmd(name, parameters)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """What is seen of all that match; empty while nothing does."""
        try:
            return "\n".join(found.text for found in self.all(selector) if found.is_displayed())
        except StaleElementReferenceException:
            return ""

    def shows(self, selector: str) -> bool:
        return any(found.is_displayed() for found in self.all(selector))

    def wait(self, condition: Callable[[], object], seconds: float = 10.0) -> None:
        wait_for(condition, seconds)

    def wait_for(self, selector: str, words: str = "") -> None:
        """Until it is seen, with these words in it."""
        self.wait(lambda: self.shows(selector) and words in self.text(selector))

    def click(self, selector: str) -> None:
        self.wait_for(selector)
        self.all(selector)[0].click()

    def type(self, *keys: str) -> None:
        """To whatever has the focus."""
        ActionChains(self.driver).send_keys(*keys).perform()

    def type_with(self, modifier: str, key: str) -> None:
        actions = ActionChains(self.driver)
        actions.key_down(modifier).send_keys(key).key_up(modifier).perform()

    def focused(self) -> str:
        """The id of what has the focus, else its text."""
        found: str = self.run("const a = document.activeElement; return a.id || a.textContent")
        return found.strip()

    def problems(self) -> list[str]:
        """What the console has complained of since the last time; failed calls are no complaint."""
        return [
            entry["message"]
            for entry in self.driver.get_log("browser")  # type: ignore[no-untyped-call]
            if entry["level"] in ("WARNING", "SEVERE") and entry["source"] != "network"
        ]


@contextmanager
def running_browser() -> Iterator[Browser]:
    """A browser with a profile of its own, ended with the block."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
