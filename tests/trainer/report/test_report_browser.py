"""The page in a browser: drawn, clicked, silent. `apt-get install chromium chromium-driver`."""

import shutil

import pytest

from njepa import cli
from tests.support.report_runs import report_run

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="there is no chromium or chromedriver"),
]

#: Of every canvas: whether anything is drawn, and its pixels.
PIXELS = """
return [...document.querySelectorAll(arguments[0])].map(canvas => {
  const empty = Object.assign(document.createElement('canvas'),
                              {width: canvas.width, height: canvas.height});
  return [canvas.toDataURL() !== empty.toDataURL(), canvas.toDataURL()];
});"""


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(300)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    run = report_run(tmp_path_factory.mktemp("run"))
    assert cli.main(["report", str(run)]) == 0
    return (run / "report.html").as_uri()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_page(browser, address, theme, width):
    features = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(address)
    ask = browser.execute_script

    charts = ask(PIXELS, ".chart canvas")
    assert len(charts) == len(browser.find_elements("css selector", ".chart")) > 8
    assert all(drawn for drawn, _ in charts)
    red = int(
        ask("return getComputedStyle(document.body).backgroundColor").split("(")[1].split(",")[0]
    )
    assert (red < 50) == (theme == "dark")
    assert ask("return document.documentElement.scrollWidth") <= width
    outside = "return [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') &&"
    outside += " e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML)"
    assert ask(outside) == []

    before = ask(PIXELS, ".likeness .map")
    marker = browser.find_elements("css selector", ".likeness .marker")[2]
    ask("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", marker)
    size = marker.size["width"]
    # Row 2 of 6, column 5: offsets are from the middle.
    place = (round((4.5 / 6 - 0.5) * size), round((1.5 / 6 - 0.5) * size))
    webdriver.ActionChains(browser).move_to_element_with_offset(marker, *place).click().perform()
    after = ask(PIXELS, ".likeness .map")
    chosen = browser.find_element("css selector", ".likeness .chosen")
    assert chosen.text == "with image 3, row 2, column 5"
    assert [a != b for a, b in zip(before, after, strict=True)] == [True] * 6
    webdriver.ActionChains(browser).send_keys(webdriver.Keys.ARROW_DOWN).perform()
    assert chosen.text == "with image 3, row 3, column 5"

    assert ask("return document.querySelectorAll('script').length") == 2  # no name became one
    assert browser.get_log("browser") == []
    requests = [
        entry["message"]
        for entry in browser.get_log("performance")
        if '"Network.requestWillBeSent"' in entry["message"]
        and '"url":"data:' not in entry["message"]
    ]
    assert len(requests) == 1, requests  # the page itself
