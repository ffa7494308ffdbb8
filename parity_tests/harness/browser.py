"""A headless Chromium with an empty profile, and what a page does in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_CONTRAST = """
const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
const light = (rgb) => {
  const linear = (c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const [r, g, b] = rgb.map((c) => linear(c / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = (node) => {
  for (let one = node; one; one = one.parentElement) {
    const found = channels(getComputedStyle(one).backgroundColor);
    if (found.length === 3 || found[3] > 0) return found.slice(0, 3);
  }
};
const spoken = (node) => [...node.childNodes].some((one) => one.nodeType === 3 && one.data.trim());
const worst = {};
for (const node of document.querySelectorAll("body *")) {
  const marked = !["none", "normal"].includes(getComputedStyle(node, "::before").content);
  if (!node.checkVisibility() || !(marked || spoken(node))) continue;
  const inside = node.closest("svg");
  const style = getComputedStyle(node);
  const ink = light(channels(inside ? style.fill : style.color).slice(0, 3));
  const paper = light(ground(inside || node));
  const ratio = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
  const name = node.tagName.toLowerCase() + "." + (node.getAttribute("class") || "");
  worst[name] = Math.min(ratio, worst[name] ?? 99);
}
return worst;
"""


class Browser:
    """One open page. `driver` is Selenium's."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, file: Path, width: int = 1200, scheme: str = "light", media: str = "") -> None:
        """Show a file from disk in a window of `width` pixels; below 500 it is a phone's."""
        self.driver.get("about:blank")
        self.reached()
        self.driver.get_log("browser")
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=800,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        scheme_ = {"name": "prefers-color-scheme", "value": scheme}
        self.command("Emulation.setEmulatedMedia", media=media, features=[scheme_])
        self.driver.get(file.as_uri())

    def command(self, name: str, **parameters: Any) -> Any:
        return self.driver.execute_cdp_cmd(name, parameters)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def press(self, *keys: str) -> None:
        self.driver.switch_to.active_element.send_keys(*keys)

    def reached(self) -> list[str]:
        """The addresses that were asked for since the last time."""
        messages = [
            json.loads(one["message"])["message"] for one in self.driver.get_log("performance")
        ]
        return [
            one["params"]["request"]["url"]
            for one in messages
            if one["method"] == "Network.requestWillBeSent"
        ]

    def complaints(self) -> list[str]:
        """What the console was told since the page was opened."""
        return [one["message"] for one in self.driver.get_log("browser")]

    def overflow(self) -> int:
        """By how many pixels the page is wider than the window."""
        return int(
            self.run(
                "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
            )
        )

    def is_visible(self, element: Any) -> bool:
        """Whether it takes room on the page; Selenium takes closed details for hidden in print."""
        return bool(
            self.run(
                "return arguments[0].checkVisibility()"
                " && arguments[0].getBoundingClientRect().height > 0",
                element,
            )
        )

    def contrasts(self) -> dict[str, float]:
        """Smallest contrast (WCAG 2.2, 1.4.3) of the visible text, by tag and class."""
        return dict(self.run(_CONTRAST))


@contextmanager
def open_browser(profile: Path) -> Iterator[Browser]:
    """Start it; the test is skipped where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="Selenium is not installed")
    from selenium.webdriver.chrome.service import Service

    binary = next(filter(None, map(shutil.which, _BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no Chromium with its chromedriver on PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for one in (*_ARGUMENTS, f"--user-data-dir={profile}"):
        options.add_argument(one)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield Browser(opened)
    finally:
        opened.quit()
