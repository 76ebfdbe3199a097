"""In a browser: the documentation site, every page in light and dark at the width of a phone, its pictures and its search.

And the report of a comparison, whose tables can be copied.
"""

import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

selenium = pytest.importorskip("selenium", reason="needs selenium, of the extra test")
from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

from ds_optforge.cli import main  # noqa: E402
from tests.experiments.files import common, write_config, write_yaml  # noqa: E402
from tests.test_site import ENVIRONMENT, ROOT  # noqa: E402

PROGRAMS = shutil.which("chromium"), shutil.which("chromedriver")
PAGES = sorted([*(path.stem for path in (ROOT / "docs").glob("*.md")), "changelog"])
PHONE, DESK = (390, 844), (1280, 900)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(None in PROGRAMS, reason="needs Debian's chromium and chromium-driver"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the built site, on this machine alone."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, env=ENVIRONMENT)
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """A headless Chromium, for which there is nothing but this machine."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(PROGRAMS[0])
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(PROGRAMS[1])))
    yield driver
    driver.quit()


def show(browser: webdriver.Chrome, size: tuple[int, int], scheme: str) -> None:
    width, height = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_whole_in_light_and_dark_and_on_a_phone(page: str, browser: webdriver.Chrome, site: str) -> None:
    """Nothing is wider than the screen but what scrolls by itself (tables, code), and every picture is there."""
    backgrounds = set()
    for scheme in ("light", "dark"):
        show(browser, PHONE, scheme)
        browser.get(f"{site}/{page}.html")
        assert browser.find_element(By.TAG_NAME, "h1").text
        assert browser.execute_script("return document.documentElement.scrollWidth") <= PHONE[0]
        broken = "return [...document.images].filter(i => !(i.complete && i.naturalWidth)).map(i => i.src)"
        assert browser.execute_script(broken) == []
        backgrounds.add(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert len(backgrounds) == 2, "the dark page looks like the light one"
    errors = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert errors == []


@pytest.mark.parametrize(("words", "page"), [("gather_every", "optimizers.html"), ("not registered", "troubleshooting.html")])
def test_the_search_finds_without_a_network(words: str, page: str, browser: webdriver.Chrome, site: str) -> None:
    show(browser, DESK, "light")
    browser.get(f"{site}/index.html")
    browser.find_element(By.CSS_SELECTOR, ".md-search__input").send_keys(words)
    found = WebDriverWait(browser, 20).until(lambda driver: driver.find_elements(By.CSS_SELECTOR, ".md-search-result__link"))
    assert any(page in (link.get_attribute("href") or "") for link in found)


def test_a_report_that_was_opened_as_a_file_copies_its_table(browser: webdriver.Chrome, tmp_path: Path) -> None:
    runs = {name: {"config": write_config(tmp_path), "lr": rate} for name, rate in (("slow", 0.1), ("fast", 0.5))}
    main(["compare", str(write_yaml(tmp_path, common(tmp_path, runs=runs, seeds=[0, 1])))])
    browser.get_log("browser")  # earlier pages'
    browser.get((tmp_path / "out" / "report.html").as_uri())
    browser.find_element(By.CSS_SELECTOR, "summary").click()
    button = browser.find_element(By.TAG_NAME, "button")
    button.click()
    assert button.text == "copied"
    browser.execute_script("document.body.append(document.createElement('textarea'))")
    area = browser.find_element(By.TAG_NAME, "textarea")
    area.send_keys(Keys.CONTROL, "v")
    assert area.get_property("value").strip() == (tmp_path / "out" / "results.md").read_text().strip()
    broken = "return [...document.images].filter(i => !(i.complete && i.naturalWidth)).length"
    assert browser.execute_script(broken) == 0
    assert [entry["message"] for entry in browser.get_log("browser")] == []
