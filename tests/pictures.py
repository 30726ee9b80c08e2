"""The pictures of a report that the README shows: python tests/pictures.py RUN (a folder that holds a report.html)."""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

OUT = Path(__file__).parent.parent / "moe" / "lab" / "report" / "pictures"
COLOURS = 240  # of a picture: charts and letters have few


def save(page: Page, name: str) -> None:
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    image.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        OUT / f"{name}.png", optimize=True
    )
    print(OUT / f"{name}.png")


def show(page: Page, address: str, part: str) -> None:
    page.goto(address)
    page.wait_for_selector("body[data-ready=yes]")
    page.locator(part).evaluate("element => element.scrollIntoView()")


def main(run: Path) -> None:
    address = (run / "report.html").resolve().as_uri()
    OUT.mkdir(exist_ok=True)
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        light = browser.new_page(viewport={"width": 1060, "height": 960}, color_scheme="light")
        show(light, address, "h1")
        save(light, "light")
        dark = browser.new_page(viewport={"width": 1060, "height": 890}, color_scheme="dark")
        show(dark, address, "#text-by-expert")
        dark.locator("#text").select_option("from the validation split")
        dark.locator("#token-41").hover()
        save(dark, "dark")
        phone = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="light")
        show(phone, address, "#balance")
        save(phone, "phone")
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
