"""Chromium, logged in to the stack's Airflow."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of an installed Chromium."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        complaint = f"no Chromium: none of {', '.join(NAMES)} is on the PATH"
        if os.environ.get("CI"):
            pytest.fail(complaint)
        pytest.skip(complaint)
    return found


@pytest.fixture(scope="session")
def browser(chromium: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def fresh_page(browser: Browser, environment: dict[str, str]) -> Iterator[Callable[..., Page]]:
    """Make a page of a browser that has never been anywhere, logged in to Airflow if asked."""
    contexts = []

    def make(*, log_in: bool = False, **options: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1400, "height": 1000}} | options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        if log_in:
            _log_in(page, environment)
        return page

    yield make
    for context in contexts:
        context.close()


@pytest.fixture
def logged_in(fresh_page: Callable[..., Page]) -> Page:
    """A page with Airflow's session cookie; closed after the test, for Airflow's pages ask it every few seconds."""
    return fresh_page(log_in=True)


def _log_in(page: Page, environment: dict[str, str]) -> None:
    page.goto(environment["MLPIPE_AIRFLOW_URL"])
    page.fill("input[name=username]", environment["MLPIPE_AIRFLOW_USER"])
    page.fill("input[name=password]", environment["MLPIPE_AIRFLOW_PASSWORD"])
    page.keyboard.press("Enter")
    page.get_by_role("link", name="Dags").first.wait_for()
