"""The page in headless Chromium. Needs the packages and the browser that docs/demo.md names; run with make test-demo."""

import re
import shutil
import socket
from contextlib import contextmanager
from urllib.parse import urlparse
from urllib.request import urlopen

import pytest

from demo_page.settings import Limits
from tests.demo_models import demo_model

pytestmark = pytest.mark.browser

PATIENCE = 120_000  # milliseconds
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


@contextmanager
def served(task="generate", **options):
    """The address of a page for a small model."""
    from demo_page.page import build_page, serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    blocks = build_page(demo_model(task, **options))
    try:
        yield serve(blocks, "127.0.0.1", port, waiting=4)
    finally:
        blocks.close(verbose=False)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    assert chromium, "these tests need Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """A page in the browser, with the hosts that it contacted and the errors in its console."""

    def __init__(self, browser, address, viewport):
        self.page = browser.new_page(viewport=viewport)
        self.page.set_default_timeout(PATIENCE)
        self.hosts, self.errors = set(), []
        self.page.on("request", lambda request: self.hosts.add(urlparse(request.url).hostname))
        self.page.on("console", lambda line: self.errors.append(line.text) if line.type == "error" else None)
        self.page.goto(address)
        self.page.get_by_role("tab", name="Samples").wait_for()

    def open(self, tab):
        self.page.get_by_role("tab", name=tab, exact=True).click()

    def press(self, button):
        self.page.get_by_role("button", name=button, exact=True).click()

    def picture(self, name, other_than=None):
        """The address of a picture, after it has loaded and differs from `other_than`."""
        found = self.page.get_by_role("img", name=name, exact=True)
        found.wait_for()
        test = "([image, old]) => image.naturalWidth > 100 && image.src !== old"
        self.page.wait_for_function(test, arg=[found.element_handle(), other_than])
        return found.get_attribute("src")

    def paint(self, start, end):
        """Paint a stroke on the visible canvas, between two points relative to its middle, in pixels."""
        self.page.locator("canvas:visible").first.scroll_into_view_if_needed()
        box = self.page.locator("canvas:visible").first.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.page.mouse.move(x + start[0], y + start[1])
        self.page.mouse.down()
        self.page.mouse.move(x + end[0], y + end[1], steps=10)
        self.page.mouse.up()
        self.page.wait_for_timeout(1500)  # the editor sends the stroke a moment later


def test_the_page_names_no_other_host():
    with served() as address, urlopen(address) as answer:
        text = answer.read().decode()
    hosts = {urlparse(found).hostname for found in re.findall(r"https?://[^\s\"'<>\\]+", text)}
    assert hosts <= {"127.0.0.1"}
    assert answer.headers["content-security-policy"]


@pytest.mark.parametrize("viewport", [DESK, PHONE], ids=["desk", "phone"])
def test_every_tab_of_a_network_for_generation(browser, viewport):
    with served() as address:
        visit = Visit(browser, address, viewport)
        visit.press("Sample")
        first = visit.picture("Samples")
        visit.page.get_by_text("4 evaluations of the velocity").or_(
            visit.page.get_by_text("8 evaluations of the velocity")
        ).wait_for()
        slider = visit.page.get_by_role("slider", name=re.compile("From noise")).first
        slider.focus()
        visit.page.keyboard.press("Home")
        visit.picture("Samples", first)
        visit.press("Next seed")
        visit.page.wait_for_function("() => [...document.querySelectorAll('input')].some(each => each.value === '1')")
        visit.open("Interpolate")
        visit.page.get_by_role("button", name="Interpolate", exact=True).click()
        visit.picture("All samples")
        visit.picture("One sample")
        visit.open("Inpaint")
        visit.press("Fill")
        visit.page.get_by_text("there is no image yet").first.wait_for()
        visit.press("Draw an image")
        visit.page.wait_for_timeout(4000)
        visit.paint((-40, 0), (40, 20))
        visit.press("Fill")
        visit.picture("Filled images")
        visit.open("Map")
        visit.page.get_by_text("was not trained on label maps").wait_for()
        wide = visit.page.evaluate("document.documentElement.scrollWidth")
        assert wide <= viewport["width"]
    assert visit.hosts <= {"127.0.0.1", "", None}
    assert not [text for text in visit.errors if "Content Security Policy" in text]


def test_a_painted_label_map_changes_the_samples(browser):
    with served("semantic") as address:
        visit = Visit(browser, address, DESK)
        visit.page.get_by_text("Use the tab Map").first.wait_for()
        visit.open("Map")
        visit.page.get_by_text("shoe", exact=True).first.wait_for()
        visit.page.wait_for_timeout(3000)
        visit.press("Draw")
        first = visit.picture("Samples for the map")
        visit.paint((-170, -170), (170, -170))
        visit.press("Draw")
        visit.picture("Samples for the map", first)
    assert visit.hosts <= {"127.0.0.1", "", None}


def test_few_step_networks_sample_at_every_change(browser):
    with served(until_embedding="interval") as address:
        visit = Visit(browser, address, DESK)
        visit.press("Next seed")
        first = visit.picture("Samples")
        visit.press("Next seed")
        visit.picture("Samples", first)


def test_a_request_over_its_limit_says_so(browser):
    with served(limits=Limits(8, 20, 0.0)) as address:
        visit = Visit(browser, address, DESK)
        visit.press("Sample")
        visit.page.get_by_text("longer than 0 seconds").first.wait_for()
