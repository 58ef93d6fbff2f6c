"""The page in a real browser. Every test fails on an error in the console and on a request to another host."""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from affine import Affine
from odc.geo.geobox import GeoBox
from PIL import Image

from ai4land.serve.app import make_app
from tests.maps import FLAGS, HILDA, some_codes, write_maps
from tests.servers import running

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
YEARS = (1990, 1991, 1995, 2000)
OWED = {"attribution": "HILDA+ by Winkler, see doi:10.1594/x; and others"}
HOSTILE = ["<img/src=x/onerror=window.hit=1>", "<script>window.hit=2</script>", "\"'><svg/onload=window.hit=3>"]


def quarters(seed: int = 0) -> np.ndarray:
    """Maps of 4 years; in the north-east all urban, cropland, forest, water in turn."""
    codes = some_codes((4, 64, 128), seed=seed, fill=False)
    for i, code in enumerate((11, 22, 44, 77)):
        codes[i, :32, 64:] = code
    codes[:, :, :2] = HILDA.fill.code
    return codes


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("playwright is not installed: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        options = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        browser = play.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def cube_url(tmp_path_factory) -> Iterator[str]:
    path = write_maps(tmp_path_factory.mktemp("page") / "cube.zarr", codes=quarters(), years=YEARS, attrs=OWED)
    with running(make_app(str(path))) as (url, _):
        yield url


@pytest.fixture
def visit(chromium) -> Iterator[Callable[..., Any]]:
    """Open a page at an address; at the end there were no errors in its console and no requests to elsewhere."""
    troubles: list[str] = []
    contexts = []

    def go(url: str, *, width: int = 1280, height: int = 800, ready: bool = True, **options: Any) -> Any:
        contexts.append(chromium.new_context(viewport={"width": width, "height": height}, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(15_000)
        page.on("console", lambda m: troubles.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("dialog", lambda dialog: (troubles.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda r: None if r.url.startswith((url.split("#")[0], "blob:")) else troubles.append(f"asks {r.url}"))
        page.goto(url)
        if ready:
            shown(page)
        return page

    yield go
    for context in contexts:
        context.close()
    assert troubles == []


def until(page: Any, condition: str) -> None:
    """Wait until an expression holds; Playwright's own way of waiting needs ``eval``, which the page forbids."""
    for _ in range(200):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"it did not come to hold: {condition}")


def shown(page: Any, year: int | None = None) -> None:
    """Wait until the map shows a year whole."""
    text = "document.getElementById('map').dataset.year"
    until(page, f"{text} === '{year}'" if year else f"!!{text}")
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def picture(page: Any) -> np.ndarray:
    """Pixels of the map as they are on the screen."""
    return np.asarray(Image.open(io.BytesIO(page.locator("#map").screenshot())).convert("RGB"))


def at(page: Any, lon: float, lat: float) -> tuple[float, float]:
    """Place of a longitude and latitude on the screen."""
    box = page.locator("#map").bounding_box()
    x, y = page.evaluate(
        """async ([lon, lat]) => {
            const { toX, toY } = await import("./map.js");
            const at = new URLSearchParams(location.hash.slice(1));
            const size = 256 * 2 ** at.get("zoom");
            const turn = Math.round(toX(Number(at.get("lon"))) - toX(lon));
            return [(toX(lon) + turn - toX(Number(at.get("lon")))) * size, (toY(lat) - toY(Number(at.get("lat")))) * size];
        }""",
        [lon, lat],
    )
    return box["x"] + box["width"] / 2 + x, box["y"] + box["height"] / 2 + y


def settle(page: Any) -> None:
    """Wait until the address tells the view."""
    until(page, "location.hash.includes('zoom')")
    page.wait_for_timeout(350)


def colour_of(code: int) -> tuple[int, ...]:
    return next(tuple(bytes.fromhex(c.colour[1:])) for c in HILDA.classes if c.code == code)


def test_the_page_loads_and_its_legend_is_that_of_the_cube(visit, cube_url):
    page = visit(f"{cube_url}/")
    assert page.title() == page.locator("h1").inner_text() == "Maps for a test"
    assert page.locator("#shown").inner_text() == "2000"
    assert page.locator("#classes .class span").all_inner_texts() == [n.replace("_", " ") for n in HILDA.names]
    colours = page.locator("#classes .swatch").evaluate_all("all => all.map((e) => getComputedStyle(e).backgroundColor)")
    assert colours == [f"rgb{colour_of(c.code)}" for c in HILDA.classes]
    assert "Licence: CC-BY-4.0" in page.locator("#credit").inner_text()
    assert "Data: HILDA+ by Winkler, see doi:10.1594/x" in page.locator("#credit").inner_text()
    assert page.locator("#credit a").evaluate_all("all => all.map((a) => a.href)") == ["https://doi.org/10.1594/x"]
    assert page.locator("#links a").count() == 1
    drawn = {tuple(c) for c in picture(page).reshape(-1, 3)}
    assert {colour_of(c.code) for c in HILDA.classes} <= drawn


def test_the_slider_changes_the_map(visit, cube_url):
    page = visit(f"{cube_url}/")
    settle(page)
    x, y = at(page, 97.3, 43.3)
    box = page.locator("#map").bounding_box()
    page.locator("#year").focus()
    for key, year, code in (("Home", 1990, 11), ("ArrowRight", 1991, 22), ("ArrowRight", 1995, 44), ("End", 2000, 77)):
        page.keyboard.press(key)
        shown(page, year)
        assert page.locator("#shown").inner_text() == str(year)
        assert page.locator("#year").get_attribute("aria-valuetext") == str(year)
        assert tuple(picture(page)[int(y - box["y"]), int(x - box["x"])]) == colour_of(code)


def test_play_goes_through_the_years_and_stops(visit, cube_url):
    page = visit(f"{cube_url}/")
    page.locator("#play").click()
    assert page.locator("#play").get_attribute("aria-pressed") == "true"
    for year in (1990, 1991, 1995):
        until(page, f"document.getElementById('shown').textContent === '{year}'")
    page.locator("#play").click()
    now = page.locator("#shown").inner_text()
    page.wait_for_timeout(1500)
    assert page.locator("#shown").inner_text() == now


def test_the_class_under_the_pointer_and_the_years_of_a_place(visit, cube_url):
    page = visit(f"{cube_url}/")
    settle(page)
    page.mouse.move(*at(page, 97.3, 43.3))
    assert page.locator("#under b").inner_text() == "water"
    page.mouse.click(*at(page, 97.3, 43.3))
    page.wait_for_selector("#found:not([hidden])")
    assert page.locator("#what b").inner_text() == "water"
    assert page.locator("#runs li").all_inner_texts() == ["1990\nurban", "1991\ncropland", "1995\nforest", "2000\nwater"]
    assert "3 changes" in page.locator("#strip").get_attribute("aria-label")
    assert "80 %" in page.locator("#shares").inner_text()
    assert "water" in page.locator("#spoken").text_content()
    box = page.locator("#strip").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.1, box["y"] + 5)
    shown(page, 1990)
    assert page.locator("#what b").inner_text() == "urban"
    page.locator("#forget").click()
    assert page.locator("#found").is_hidden()


def test_wheel_buttons_drag_and_keys_move_the_map(visit, cube_url):
    page = visit(f"{cube_url}/")
    settle(page)

    def view() -> tuple[float, ...]:
        page.wait_for_timeout(600)
        return tuple(
            page.evaluate("['zoom', 'lon', 'lat'].map((k) => Number(new URLSearchParams(location.hash.slice(1)).get(k)))")
        )

    home = view()
    page.locator("#in").click()
    assert view()[0] == pytest.approx(home[0] + 1, abs=0.02)
    page.locator("#home").click()
    assert view() == pytest.approx(home, abs=0.02)
    x, y = at(page, 20, 20)
    page.mouse.move(x, y)
    page.mouse.wheel(0, -240)
    assert view()[0] > home[0] + 0.5 and at(page, 20, 20) == pytest.approx((x, y), abs=2)
    before = view()
    page.mouse.down()
    page.mouse.move(x - 120, y + 40, steps=4)
    page.mouse.up()
    assert view()[1] > before[1] and view()[2] > before[2] and page.locator("#found").is_hidden()
    page.locator("#map").focus()
    page.keyboard.press("0")
    assert view() == pytest.approx(home, abs=0.02)
    page.keyboard.press("+")
    page.wait_for_timeout(400)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowUp")
    moved = view()
    assert moved[0] > home[0] and moved[1] > home[1] and moved[2] > home[2]
    page.keyboard.press(",")
    shown(page, 1995)
    page.keyboard.press("Enter")
    page.wait_for_selector("#found:not([hidden])")
    assert page.locator("#cross").is_visible()


def test_a_class_stands_out_and_the_address_keeps_the_view(visit, cube_url):
    page = visit(f"{cube_url}/#year=1991&lat=43.3&lon=97.3&zoom=3")
    assert page.locator("#shown").inner_text() == "1991"
    middle = tuple(s // 2 for s in picture(page).shape[:2])
    assert tuple(picture(page)[middle]) == colour_of(22)
    page.locator("#classes button").nth(0).click()
    page.wait_for_timeout(200)
    assert tuple(picture(page)[middle]) != colour_of(22)
    page.locator("#classes button").nth(1).click()
    page.wait_for_timeout(200)
    assert tuple(picture(page)[middle]) == colour_of(22)


def test_parts_are_chosen_in_a_list_and_keep_the_year(visit, tmp_path):
    for name, seed in (("historical", 1), ("ssp126", 2)):
        attrs = {"title": f"Maps of {name}"}
        write_maps(tmp_path / "c.zarr", codes=quarters(seed), years=YEARS, group=name, attrs=attrs)
    with running(make_app(str(tmp_path / "c.zarr"))) as (url, _):
        page = visit(f"{url}/#year=1991")
        assert page.locator("#part option").all_inner_texts() == ["historical", "ssp126"]
        before = picture(page)
        page.locator("#part").select_option("ssp126")
        until(page, "document.title === 'Maps of ssp126'")
        shown(page, 1991)
        page.wait_for_timeout(200)
        assert not np.array_equal(before, picture(page))
        settle(page)
        assert "part=ssp126" in page.url


def test_a_region_is_shown_whole(visit, tmp_path):
    box = GeoBox((64, 64), Affine(1000, 0, 4_300_000, 0, -1000, 3_100_000), "EPSG:3035")
    path = write_maps(tmp_path / "c.zarr", codes=some_codes((3, 64, 64), fill=False), box=box)
    with running(make_app(str(path))) as (url, _):
        page = visit(f"{url}/")
        land = {colour_of(c.code) for c in HILDA.classes}
        share = np.mean([tuple(c) in land for c in picture(page)[::8, ::8].reshape(-1, 3)])
        assert share > 0.2


def test_hostile_names_are_inert(visit, tmp_path):
    names = [*HOSTILE, *FLAGS["flag_meanings"].split()[len(HOSTILE) :]]
    nasty = "<img src=x onerror=window.hit=4><script>window.hit=5</script>"
    attrs = {"title": nasty, "source": nasty, "references": "javascript:window.hit=6", "license": "https://x.invalid/<b>\"'"}
    flags = {**FLAGS, "flag_meanings": " ".join(names)}
    for name in ("a", "<b>&x"):
        write_maps(tmp_path / "c.zarr", codes=quarters(), years=YEARS, flags=flags, attrs=attrs, group=name)
    with running(make_app(str(tmp_path / "c.zarr"))) as (url, _):
        page = visit(f"{url}/")
        settle(page)
        assert page.locator("h1").inner_text() == nasty and page.title() == nasty
        assert page.locator("#classes .class span").first.inner_text() == HOSTILE[1].replace("_", " ")
        page.mouse.move(*at(page, 97.3, 43.3))
        page.mouse.click(*at(page, 97.3, 43.3))
        page.wait_for_selector("#found:not([hidden])")
        page.wait_for_timeout(300)
        assert page.evaluate("window.hit") is None
        assert page.locator("img, body svg[onload], h1 *, #credit script, #classes script").count() == 0
        assert page.locator("#credit a").evaluate_all("all => all.map((a) => a.protocol)") == ["https:"]


def test_inline_scripts_would_not_run(chromium, cube_url):
    """The policy itself: what would be injected is refused by the browser."""
    context = chromium.new_context()
    page = context.new_page()
    page.goto(f"{cube_url}/")
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hit = 1\">')")
    page.evaluate("const s = document.createElement('script'); s.textContent = 'window.hit = 2'; document.body.append(s)")
    page.wait_for_timeout(300)
    assert page.evaluate("window.hit") is None
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_it_fits_and_can_be_read_on_desk_and_phone(visit, cube_url, width, height, scheme):
    phone = width < 500
    page = visit(f"{cube_url}/", width=width, height=height, color_scheme=scheme, has_touch=phone, is_mobile=phone)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    box, bar = page.locator("#map").bounding_box(), page.locator("#times").bounding_box()
    assert box["height"] > 0.45 * height and bar["y"] + bar["height"] <= height + 1
    for one in page.locator("button:visible, select:visible, input:visible").all():
        size = one.bounding_box()
        assert min(size["width"], size["height"]) >= 24, one.get_attribute("id")
        assert one.evaluate("(e) => !!(e.ariaLabel || e.textContent.trim() || e.labels?.length)")
    for pair in ("h1", ".quiet", "#credit", "#shown", "#links a", ".class"):
        assert page.locator(pair).first.evaluate(CONTRAST) >= 4.5, pair
    if phone:
        settle(page)
        page.touchscreen.tap(*at(page, 97.3, 43.3))
        page.wait_for_selector("#found:not([hidden])")
    folder = os.environ.get("AI4LAND_SCREENSHOTS")
    if folder:
        page.screenshot(path=f"{folder}/{width}-{scheme}.png")


CONTRAST = """(e) => {
  const light = (text) => {
    const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  let back = e;
  while (back && /rgba?\\(0, 0, 0, 0\\)|transparent/.test(getComputedStyle(back).backgroundColor)) back = back.parentElement;
  const [a, b] = [light(getComputedStyle(e).color), light(getComputedStyle(back ?? document.body).backgroundColor)];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""
