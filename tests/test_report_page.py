"""The report in a browser: Chromium without a window. Left out where there is none."""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import TEXT, run_training

import moe
from moe.corpus import prepare
from moe.lab.report.make import make_report

EVIL = b"<script>alert(1)</script><img src=x onerror=alert(2)>&amp; \"q\" 'p' </script><!-- \xff\x00 \xf0\x9f\x98\x80\n"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 120_000  # ms: a machine may be busy
NAME = '<b onclick="x">run & co'


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report") / NAME
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)
        layers = ("--model.num-hidden-layers", 3, "--steps", 12, "--train.log-interval", 2, "--train.eval-interval", 5)
        assert run_training("--out", folder, "--data", TEXT, "--quiet", *layers) == 0
        run = moe.load(folder)
        return make_report(folder, run, prepare(run.config.data), {"<i>evil</i>.txt": EVIL})


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    from playwright.sync_api import sync_playwright

    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=quiet)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, report):
    """The page, drawn; whatever it complained of or asked the network for fails the test."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    page.on(
        "request", lambda request: said.append(request.url) if not request.url.startswith(("file:", "data:")) else 0
    )
    page.goto(report.as_uri())
    page.wait_for_selector("body[data-ready=yes]")
    yield page
    context.close()
    assert said == []


def test_every_chart_is_drawn(page):
    drawn = page.eval_on_selector_all(
        ".chart", "charts => charts.map(chart => [chart.id, chart.querySelectorAll('svg path, svg rect').length])"
    )
    names = {name.removeprefix("chart-") for name, marks in drawn if marks > 3}
    expected = {"loss", "balance-loss", "rates", "norms", "load-0", "load-1", "max_vio", "entropy", "dead_experts"}
    assert names == expected | {"bias", "specialisation", "similarity"}
    assert all(page.locator(f"#chart-{name} [aria-label]").count() for name in names)


def test_curves_are_drawn_over_steps_tokens_or_seconds_and_in_either_unit(page):
    def titles() -> str:
        return " ".join(page.locator("#chart-loss svg text").all_text_contents())

    assert "step" in titles()
    page.get_by_label("tokens", exact=True).check()
    page.get_by_label("bits per byte", exact=True).check()
    page.wait_for_function("document.querySelector('#chart-loss svg').textContent.includes('bits per byte')")
    assert "tokens" in titles()
    page.get_by_label("seconds of training").check()
    page.wait_for_function("document.querySelector('#chart-loss svg').textContent.includes('seconds')")


def test_markup_and_script_of_a_text_or_a_name_stay_text(page):
    assert page.locator("h1").text_content() == NAME
    assert page.locator("#text option").all_text_contents()[0] == "<i>evil</i>.txt"
    shown = page.locator("#reading").text_content()
    assert "<script>alert(1)</script><img src=x onerror=alert(2)>&amp;" in shown
    assert "\\xff" in shown
    assert "😀" in shown
    assert page.locator("#reading script, #reading img, h1 b, #text i").count() == 0


def test_the_layer_that_is_picked_colours_the_text(page):
    def experts() -> list[str]:
        return page.eval_on_selector_all("#reading .token", "tokens => tokens.map(token => token.dataset.expert)")

    data = json.loads(page.locator("#run").text_content())
    assert experts() == [str(chosen[0]) for chosen in data["texts"][0]["experts"][1]]
    page.locator("#layer").select_option("layer 1")
    assert experts() == [str(chosen[0]) for chosen in data["texts"][0]["experts"][0]]
    page.locator("#text").select_option("a sample of this model")
    assert len(experts()) == len(data["texts"][1]["pieces"])
    colours = page.eval_on_selector_all(
        "#reading .token", "tokens => tokens.map(t => [t.dataset.expert, getComputedStyle(t).backgroundColor])"
    )
    assert len(dict(colours)) == len({colour for _, colour in colours})


def test_pointing_at_a_token_tells_its_experts_its_probability_and_what_else_was_expected(page):
    data = json.loads(page.locator("#run").text_content())["texts"][0]
    page.locator("#token-3").hover()
    detail = page.locator("#detail").inner_text()
    for expert, gate, score in zip(*(data[name][1][3] for name in ("experts", "gates", "scores")), strict=True):
        assert re.search(rf"{expert}\s+{gate:.3f}\s+{score:.3f}", detail)
    assert "probability of" in detail
    assert all(piece.strip() in detail for piece, _ in data["alternatives"][3] if piece.isalnum())
    assert page.locator("#token-3").get_attribute("aria-selected") == "true"


def test_the_text_is_read_by_keyboard_and_by_screen_reader(page):
    page.locator("#reading").focus()
    for key, place in (("ArrowRight", 0), ("ArrowRight", 1), ("End", -1), ("Home", 0), ("ArrowLeft", 0)):
        page.keyboard.press(key)
        count = page.locator("#reading .token").count()
        assert page.locator("#reading").get_attribute("aria-activedescendant") == f"token-{place % count}"
    label = page.locator("#token-2").get_attribute("aria-label")
    assert re.fullmatch(r".+, expert \d+, \d+, probability .+ %", label)
    assert page.locator("#detail").get_attribute("aria-live") == "polite"
    page.locator("#keys button").first.focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.textContent").startswith("expert")


def test_one_expert_s_tokens_can_be_singled_out(page):
    key = page.locator("#keys button").first
    key.click()
    lit = page.locator("#reading .token.lit").count()
    assert 0 < lit < page.locator("#reading .token").count()
    page.locator("#keys button").first.click()
    assert page.locator("#reading .token.lit").count() == 0


def test_the_atlas_turns_to_the_layer_that_is_picked(page):
    first = page.locator("#experts").inner_text()
    assert page.locator("#experts article").count() == 4
    page.locator("#atlas-layer").select_option("layer 2")
    assert page.locator("#experts").inner_text() != first


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_and_follows_its_colours(browser, report, scheme):
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    page.goto(report.as_uri())
    page.wait_for_selector("body[data-ready=yes]")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    paper, ink = page.evaluate("['backgroundColor', 'color'].map(name => getComputedStyle(document.body)[name])")
    brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (paper, ink)]
    assert (brightness[0] > brightness[1]) == (scheme == "light")
    axis = page.locator("#chart-norms svg text").first.evaluate("text => getComputedStyle(text).fill")
    assert (sum(map(int, re.findall(r"\d+", axis)[:3])) < 384) == (scheme == "light")
    context.close()


def test_the_page_is_one_file_that_asks_for_nothing(report):
    html = report.read_text("utf-8")
    assert len(html.encode()) < 2_000_000
    head = html[: html.index("<style>")]
    assert "default-src 'none'" in head
    body = re.sub(r"<script type=.*?</script>", "", html, flags=re.DOTALL)
    asked = re.findall(r"(?:src|href)=[\"']([^\"']*)", re.sub(r"<pre.*?</pre>", "", body, flags=re.DOTALL))
    assert all(address.startswith(("#", "data:")) for address in asked)
    assert html.count("</script>") == 3
