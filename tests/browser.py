"""Pages in a real browser: headless Chromium, opened from disk, and not one request or complaint passes unseen."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from medseg.download import NIIVUE, download_viewer, viewer_folder

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

_NAMES = ("chromium", "chromium-browser", "google-chrome")
# software rendering, so that WebGL2 works without a graphics card
_ARGUMENTS = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]


def _lacking(reason: str) -> NoReturn:
    """Skip, or fail where nobody would see that it was skipped."""
    if os.environ.get("CI"):
        pytest.fail(f"CI is set, and {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium as the system has it; where there is none the test is skipped, and fails in CI."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _lacking("Playwright is not installed: pip install 'medseg[test]'")
    path = next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        _lacking(f"there is no browser: install one of {', '.join(_NAMES)}")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=_ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A new page of 1200 x 900 pixels, in a context of its own."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    yield context.new_page()
    context.close()


@pytest.fixture
def open_file(page: Page) -> Iterator[Callable[[Path], Page]]:
    """Open a file in ``page``; at the end of the test nothing was complained about, and nothing else asked for."""
    complaints: list[str] = []
    asked: list[str] = []
    opened: list[str] = []
    page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda failure: complaints.append(f"error: {failure}"))
    page.on("request", lambda request: asked.append(request.url))

    def open_(path: Path) -> Page:
        opened.append(path.resolve().as_uri())
        page.goto(opened[-1])
        return page

    yield open_
    page.wait_for_timeout(50)  # what was begun last comes in
    assert [text for text in complaints if text.startswith(("error", "warning"))] == []
    assert asked == opened


@pytest.fixture
def niivue(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """NiiVue, as if it had been downloaded; the test is skipped where ``MEDSEG_TEST_VIEWER`` names no npm package."""
    tarball = os.environ.get("MEDSEG_TEST_VIEWER")
    if not tarball:
        pytest.skip("needs NiiVue: set MEDSEG_TEST_VIEWER to what `npm pack @niivue/niivue@0.69.0` makes")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    viewer_folder().mkdir(parents=True)
    shutil.copy(tarball, viewer_folder() / NIIVUE.file)
    return download_viewer()


def faults(page: Page) -> list[str]:
    """Serious and critical violations that axe-core finds: rule, and the elements concerned."""
    from axe_playwright_python.sync_playwright import Axe

    found: list[dict[str, Any]] = Axe().run(page).response["violations"]
    grave = [violation for violation in found if violation["impact"] in ("serious", "critical")]
    return [f"{violation['id']}: {[node['html'] for node in violation['nodes']]}" for violation in grave]
