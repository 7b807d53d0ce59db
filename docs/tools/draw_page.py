"""Draw docs/paint.jpg: water painted into a map, on the page of --serve.

python docs/tools/draw_page.py weights/map-to-satellite.pt        needs Playwright and Chromium
"""

import io
import shutil
import signal
import subprocess
import sys

from paths import DOCS, ROOT
from PIL import Image
from playwright.sync_api import sync_playwright

from support.checkpoints import load_weights

STROKE = ((0.4, 0.45), (0.55, 0.5), (0.6, 0.6), (0.5, 0.65))  # of the map's width and height


def served(checkpoint):
    """(process, address) of the page for a checkpoint."""
    script = ROOT / f"{load_weights(checkpoint)['script']}.py"
    call = [sys.executable, script, "--serve", "--port", "0", "--checkpoint", checkpoint]
    process = subprocess.Popen(call, stdout=subprocess.PIPE, text=True)
    address = next(line for line in process.stdout if line.startswith("paint at")).split()[2]
    return process, address


def painted(page):
    """A screenshot after one stroke of water."""
    page.wait_for_selector('body[data-painted="1"]')
    page.click("text=water")
    page.fill("#size", "60")
    box = page.locator("#map").bounding_box()
    for k, (x, y) in enumerate(STROKE):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=8)
        if k == 0:
            page.mouse.down()
    page.mouse.up()
    page.wait_for_selector('body[data-painted="2"]')
    return Image.open(io.BytesIO(page.screenshot())).convert("RGB")


if __name__ == "__main__":
    if len(sys.argv) != 2 or "--help" in sys.argv:
        sys.exit(__doc__)
    server, url = served(sys.argv[1])
    with sync_playwright() as playwright:
        chromium = {"executable_path": shutil.which("chromium"), "args": ["--no-sandbox"]}
        browser = playwright.chromium.launch(**chromium)
        tab = browser.new_page(viewport={"width": 1000, "height": 690})
        tab.goto(url)
        painted(tab).save(DOCS / "paint.jpg", quality=80)
        browser.close()
    server.send_signal(signal.SIGINT)
    server.wait()
