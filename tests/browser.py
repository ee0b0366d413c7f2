"""Debian's Chromium, headless, for tests of pages."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = "" if CHROMIUM and DRIVER else "Chromium is not here: apt-get install chromium chromium-driver"


@contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """A WebDriver; it keeps its console and the requests of its pages for `console` and `requests`."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in (
        "headless=new",
        "no-sandbox",  # containers run as root; nothing but a page of our own is opened
        "disable-gpu",
        "disable-dev-shm-usage",
        "hide-scrollbars",
        f"user-data-dir={profile}",
    ):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    try:
        driver.set_page_load_timeout(60)
        yield driver
    finally:
        driver.quit()


def resize(driver: Any, width: int, height: int, *, dark: bool = False, phone: bool = False) -> None:
    """The size of the viewport in CSS pixels, and the colours that the user prefers."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def console(driver: Any) -> list[str]:
    """What the page wrote since the last call: errors, warnings, breaches of its policy."""
    return [entry["message"] for entry in driver.get_log("browser")]


def requests(driver: Any) -> list[str]:
    """The addresses that the page asked for since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def press(driver: Any, *keys: str) -> None:
    """Type these keys, wherever the focus is."""
    from selenium.webdriver import ActionChains

    ActionChains(driver).send_keys(*keys).perform()
