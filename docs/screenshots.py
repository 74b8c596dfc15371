"""Pictures of the page "Report" for the README: `python docs/screenshots.py DAG_RUN_ID`, beside a running local stack.

It needs Chromium, and Playwright from this project's extra `dev`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from mlpipe.airflow_api import AirflowApi
from mlpipe.stack.local import StackSettings


def main(run_id: str) -> None:
    login = StackSettings.load().client_environment()
    url, user, password = (login[name] for name in AirflowApi.VARIABLES)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport={"width": 1300, "height": 1320}, color_scheme=scheme)
            page.goto(url)
            page.fill("input[name=username]", user)
            page.fill("input[name=password]", password)
            page.keyboard.press("Enter")
            page.get_by_role("link", name="Dags").first.wait_for()
            page.goto(f"{url}/dags/image_classification/runs/{run_id}/plugin/report")
            page.frame_locator("iframe").first.get_by_text("Load the model").wait_for()
            page.wait_for_timeout(500)  # fonts and pictures
            page.screenshot(path=Path(__file__).with_name(f"report-{scheme}.png"))
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
