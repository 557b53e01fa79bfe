"""The report in a real browser: by mouse, by keyboard alone, on a phone, without JavaScript, on paper."""

import base64
import io
import json
import os
import shutil
import time

import numpy as np
import pytest
from PIL import Image
from report_example import make_run, render_example
from training_example import make_teaching, make_training

from t2iprobe.hypernymy.report import write_comparison
from t2iprobe.inversion.report import write_report as write_training_report
from t2iprobe.inversion.report import write_teaching_report

pytestmark = pytest.mark.browser

REQUIRED = os.environ.get("T2IPROBE_REQUIRE_BROWSER") == "1"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
)


def start_browser(profile, *, javascript=True):
    if not (CHROMIUM and DRIVER):
        if REQUIRED:
            pytest.fail("T2IPROBE_REQUIRE_BROWSER=1, but there is no chromium with its chromedriver")
        pytest.skip("no chromium with its chromedriver here: `make browser` installs them")
    webdriver = (
        pytest.importorskip("selenium.webdriver")
        if not REQUIRED
        else __import__("selenium.webdriver").webdriver
    )
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in (*OPTIONS, f"--user-data-dir={profile}", "--window-size=1280,900"):
        options.add_argument(option)
    if not javascript:
        options.add_experimental_option("prefs", {"profile.managed_default_content_settings.javascript": 2})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    driver = start_browser(tmp_path_factory.mktemp("profile"))
    driver.get("about:blank")
    time.sleep(1)  # what the browser's own first page asks for is not ours: its log is read and forgotten
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def report(tmp_path_factory, browser):
    """A page of all 860 synsets with 4 pictures each. Returns (address, results)."""
    text, results = render_example(seeds=(0, 1))
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(text, encoding="utf-8")
    return path.as_uri(), results


@pytest.fixture
def page(browser, report):
    """The report, freshly opened in a wide window."""
    return open_page(browser, report[0])


@pytest.fixture(autouse=True)
def quiet(browser):
    """Whatever a test does, the page logs no error and asks nothing of a network."""
    browser.get_log("browser"), browser.get_log("performance")
    yield
    assert browser.get_log("browser") == []
    requests = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    addresses = [
        message["params"]["request"]["url"]
        for message in requests
        if message["method"] == "Network.requestWillBeSent"
    ]
    assert addresses, "the log of requests is empty: it would not show one either"
    assert [a[:80] for a in addresses if not a.startswith(("file:", "data:", "about:", "chrome:"))] == []


def open_page(browser, address, *, width=1280, height=900, dark=False, media=""):
    browser.get("about:blank")
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": [scheme]})
    browser.get(address)
    return browser


def find(page, query):
    return page.find_element("css selector", query)


def find_all(page, query):
    return page.find_elements("css selector", query)


def press(page, *keys):
    from selenium.webdriver import ActionChains

    for key in keys:
        ActionChains(page).send_keys(key).perform()


def key(name):
    from selenium.webdriver import Keys

    return getattr(Keys, name)


def focused(page, expression):
    return page.execute_script(f"const e = document.activeElement; return {expression}")


def wait_for(condition, seconds=10):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return value


def take_screenshot(page, element=None):
    """uint8 [height, width, 3] of the window, or of one element."""
    encoded = (element or page).screenshot_as_base64 if element else page.get_screenshot_as_base64()
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB"))


def count_colours(pixels):
    return len(np.unique(pixels.reshape(-1, 3), axis=0))


def shown_rows(page):
    return page.execute_script(
        "return [...document.querySelectorAll('#synset-table tbody tr')]"
        ".filter((row) => row.offsetParent).map((row) => row.id)"
    )


def test_tree_opens_and_shows_pictures_on_the_way_down(page):
    item = "document.querySelector('.tree a[href=\"#object.n.01\"]').closest('li')"
    button = page.execute_script(f"return {item}.querySelector('button.toggle')")
    children = page.execute_script(f"return {item}.querySelectorAll(':scope > ul > li > .row')")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
    before = [row.is_displayed() for row in children]
    assert button.get_attribute("aria-expanded") == ("true" if before[0] else "false")
    button.click()
    assert [row.is_displayed() for row in children] == [not shown for shown in before]
    if not children[0].is_displayed():
        button.click()
    wait_for(lambda: children[0].find_elements("css selector", ".strip img"))
    images = children[0].find_elements("css selector", ".strip img")
    assert len(images) == 4
    wait_for(
        lambda: page.execute_script("return arguments[0].complete && arguments[0].naturalWidth", images[0])
    )
    assert all(image.get_attribute("alt") for image in images)
    assert count_colours(take_screenshot(page, images[0])) > 50


def test_expand_and_collapse_all(page):
    visible = "return [...document.querySelectorAll('.tree .row')].filter(r => r.offsetParent).length"
    find(page, "[data-tree=close]").click()
    assert page.execute_script(visible) == 1
    find(page, "[data-tree=open]").click()
    assert page.execute_script(visible) >= 860


def test_sort_by_each_column(page, report):
    rows = {row["synset"]: row for row in report[1]["synsets"]}
    start = time.monotonic()
    for column, value in ((2, "isp"), (5, "scs"), (6, "q")):
        button = find(page, f"#synset-table thead th:nth-child({column + 1}) button")
        for direction, sign in (("descending", -1), ("ascending", 1)):
            page.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
            button.click()
            header = button.find_element("xpath", "..")
            assert header.get_attribute("aria-sort") == direction
            values = [rows[name][value] for name in shown_rows(page)]
            present = [v for v in values if v is not None]
            assert present == sorted(present, key=lambda v, sign=sign: sign * v)
            assert values[: len(present)] == present  # what has no value comes last
    assert len(find_all(page, "#synset-table [aria-sort]")) == 1
    assert time.monotonic() - start < 60


def test_search_and_filters(page, report):
    search = find(page, "input[type=search]")
    search.send_keys("musical inst")
    status = find(page, "[data-count-of]")
    names = shown_rows(page)
    assert 5 < len(names) < 100
    assert "musical_instrument.n.01" in names
    assert status.text == f"{len(names)} of 860 synsets"
    assert status.get_attribute("aria-live") == "polite"
    find(page, "select[name=state] option[value=unknown]").click()
    known = {row["synset"]: row["known"] for row in report[1]["synsets"]}
    assert shown_rows(page) == [name for name in names if not known[name]]
    search.clear()
    search.send_keys("no such word")
    assert shown_rows(page) == []
    assert find(page, "[data-empty-of]").is_displayed()


def test_a_synset_by_keyboard_alone(page, report):
    page.execute_script("document.querySelector('input[type=search]').focus()")
    press(page, *"canis", key("TAB"), key("TAB"), key("TAB"), key("TAB"))
    wait_for(lambda: "dog.n.01" in shown_rows(page))
    for _ in range(40):
        if focused(page, "e.hash") == "#dog.n.01":
            break
        press(page, key("TAB"))
    outline = focused(page, "getComputedStyle(e).outlineStyle + getComputedStyle(e).outlineWidth")
    assert outline == "solid3px"
    press(page, key("ENTER"))
    wait_for(lambda: find(page, "#sheet").get_attribute("open"))
    assert focused(page, "e.textContent") == "dog"
    assert page.current_url.endswith("#dog.n.01")
    text = find(page, "#sheet").text
    row = next(row for row in report[1]["synsets"] if row["synset"] == "dog.n.01")
    for expected in (
        "An image of a dog.",
        "Canis familiaris",
        f"{row['isp']:.4f}",
        row["saw"][0][0],
        "N = 4",
    ):
        assert expected in text
    assert len(find_all(page, "#sheet .tile img")) == 4
    press(page, key("TAB"))
    assert focused(page, "e.textContent") == "Close"
    for _ in range(30):  # up to a hypernym, inside the dialog
        press(page, key("TAB"))
        if focused(page, "e.hash") == "#canine.n.02":
            break
    press(page, key("ENTER"))
    wait_for(lambda: focused(page, "e.textContent") == "canine")
    page.back()
    wait_for(lambda: focused(page, "e.textContent") == "dog")
    press(page, key("ESCAPE"))
    wait_for(lambda: not find(page, "#sheet").get_attribute("open"))
    assert focused(page, "e.hash") == "#dog.n.01"
    assert "#" not in page.current_url


def test_tree_by_arrow_keys(page):
    page.execute_script("document.querySelector('.tree .name').focus()")
    press(page, key("ARROW_DOWN"))
    assert focused(page, "e.hash") == "#abstraction.n.06"
    press(page, key("ARROW_LEFT"))
    assert page.execute_script("return document.activeElement.closest('li').className") == "closed"
    press(page, key("ARROW_DOWN"))
    assert focused(page, "e.hash") == "#physical_entity.n.01"
    press(page, key("ARROW_LEFT"), key("ARROW_LEFT"))
    assert focused(page, "e.hash") == "#entity.n.01"


def test_an_address_opens_its_synset(browser, report):
    page = open_page(browser, report[0] + "#domestic_cat.n.01")
    wait_for(lambda: find(page, "#sheet").get_attribute("open"))
    assert find(page, "#sheet h2").text == "domestic cat"
    find(page, "#sheet .button").click()
    assert not find(page, "#sheet").get_attribute("open")


def test_synset_is_found_in_the_tree(browser, report):
    page = open_page(browser, report[0] + "#spaniel.n.01")
    wait_for(lambda: find(page, "#sheet").get_attribute("open"))
    page.execute_script("[...document.querySelectorAll('#sheet button')].at(-1).click()")
    wait_for(lambda: focused(page, "e.closest('.tree') && e.hash") == "#spaniel.n.01")
    assert page.switch_to.active_element.is_displayed()


@pytest.mark.parametrize("dark", [False, True])
def test_phone_has_no_horizontal_scroll(browser, report, dark):
    page = open_page(browser, report[0], width=360, height=740, dark=dark)
    find(page, "[data-tree=open]").click()
    assert page.execute_script("return document.documentElement.scrollWidth") <= 360
    page.execute_script("document.querySelector('#synsets').scrollIntoView()")
    assert page.execute_script("return document.querySelector('#synset-table').scrollWidth") <= 360 - 2 * 14
    page.execute_script("location.hash = 'dog.n.01'")
    wait_for(lambda: find(page, "#sheet").get_attribute("open"))
    assert (
        page.execute_script(
            "const s = document.querySelector('#sheet'); return s.scrollWidth - s.clientWidth"
        )
        <= 0
    )
    pixels = take_screenshot(page)
    assert (pixels.mean() < 128) == dark


@pytest.mark.parametrize(
    "region", [".masthead", ".figures", ".charts .tall", ".cards", ".legend", "#synset-table tbody tr"]
)
def test_regions_are_not_blank(page, region):
    element = find(page, region)
    page.execute_script("arguments[0].scrollIntoView()", element)
    time.sleep(0.3)
    pixels = take_screenshot(page, element)
    background = pixels[0, 0]
    painted = (np.abs(pixels.astype(int) - background).max(axis=-1) > 40).mean()
    assert painted > 0.005
    assert count_colours(pixels) > 8


@pytest.mark.parametrize("dark", [False, True])
def test_text_has_enough_contrast(browser, report, dark):
    """WCAG 2.2 AA: 4.5 to 1 for every text, against the nearest painted ground."""
    page = open_page(browser, report[0] + "#dog.n.01", dark=dark)
    wait_for(lambda: find(page, "#sheet").get_attribute("open"))
    ratios = page.execute_script(CONTRAST)
    assert len(ratios) > 500
    assert [r for r in ratios if r[0] < 4.5][:5] == []


CONTRAST = """
const channel = (v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
function rgba(colour) {
  canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data].map((v) => v / 255);
}
const luminance = ([r, g, b]) => .2126 * channel(r) + .7152 * channel(g) + .0722 * channel(b);
function ground(element) {
  for (let e = element; e; e = e.parentElement) {
    const colour = rgba(getComputedStyle(e).backgroundColor);
    if (colour[3] > .99) return colour;
  }
  return [1, 1, 1, 1];
}
const result = [], seen = new Set();
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  if (!own || !element.checkVisibility()) continue;
  if (element.closest("svg, script, noscript, .hidden-visually, .skip")) continue;
  const colours = [rgba(getComputedStyle(element).color), ground(element)];
  const [a, b] = colours.map(luminance).sort((x, y) => y - x);
  result.push([(a + .05) / (b + .05), element.className, element.textContent.slice(0, 40)]);
}
return result;
"""


def test_reads_without_javascript(tmp_path_factory, report, browser):
    open_page(browser, report[0])  # something for the check of requests to see
    plain = start_browser(tmp_path_factory.mktemp("plain"), javascript=False)
    try:
        plain.get(report[0])
        body = find(plain, "body").text
        assert find(plain, "#headline-isp").text == f"{report[1]['results']['isp']['value']:.4f}"
        assert "Expand all" not in body
        assert "Search names" not in body
        assert len([row for row in find_all(plain, ".tree .name") if row.is_displayed()]) >= 860
        assert count_colours(take_screenshot(plain, find(plain, ".cards img"))) > 50
    finally:
        plain.quit()


def test_paper_is_expanded_and_has_no_controls(browser, report):
    page = open_page(browser, report[0], width=794, height=1123, media="print")
    assert not any(element.is_displayed() for element in find_all(page, ".controls, .contents, .toggle"))
    visible = "return [...document.querySelectorAll('.tree .row')].filter(r => r.offsetParent).length"
    assert page.execute_script(visible) >= 860
    document = base64.b64decode(page.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert document.startswith(b"%PDF")
    pages = document.count(b"/Type /Page\n") + document.count(b"/Type /Page ")
    assert 10 < pages < 80


def test_comparison_page(browser, tmp_path):
    synsets = ["dog.n.01", "bird.n.01", "insect.n.01", "acarine.n.01", "vehicle.n.01"]
    a = make_run(tmp_path / "a", synsets)
    b = make_run(tmp_path / "b", synsets, logits_seed=4, model="other")
    path = write_comparison(a, b, tmp_path / "comparison.html")
    page = open_page(browser, path.as_uri(), width=360)
    assert page.execute_script("return document.documentElement.scrollWidth") <= 360
    page = open_page(browser, path.as_uri())
    assert len(find_all(page, "#scatter circle.point")) == len(synsets)
    button = find(page, "#synset-table thead th:nth-child(5) button")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
    button.click()
    rows = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["synsets"]
    ordered = sorted(rows, key=lambda row: -row["difference"])
    assert shown_rows(page) == [row["synset"] for row in ordered]
    find(page, "#synset-table a[href='#dog.n.01']").click()
    wait_for(lambda: find(page, "#sheet").get_attribute("open"))
    assert [h.text for h in find_all(page, "#sheet .sides > div > h3:first-child")] == [
        "Embedded model",
        "other",
    ]
    assert len(find_all(page, "#sheet .tile img")) == 8


@pytest.mark.parametrize("dark", [False, True])
def test_training_and_teaching_pages(browser, tmp_path, dark):
    make_training(tmp_path / "training")
    results = make_teaching(tmp_path / "teaching")
    training = write_training_report(tmp_path / "training").as_uri()
    teaching = write_teaching_report(tmp_path / "teaching").as_uri()
    for address in (training, teaching):
        page = open_page(browser, address, width=360, dark=dark)
        assert page.execute_script("return document.documentElement.scrollWidth") <= 360
        page = open_page(browser, address, dark=dark)
        ratios = page.execute_script(CONTRAST)
        assert len(ratios) > 80
        assert [r for r in ratios if r[0] < 4.5][:5] == []
        assert count_colours(take_screenshot(page, find(page, ".chart svg"))) > 10
    button = find(page, "#number-table thead th:nth-child(4) button")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
    button.click()
    shown = [row.text.split()[0] for row in find_all(page, "#number-table tbody th")]
    ordered = sorted(results["words"], key=lambda row: -row["after"]["value"])
    assert shown == [row["word"].split()[0] for row in ordered]
