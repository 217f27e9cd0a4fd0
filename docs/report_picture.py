"""Makes docs/report.png anew: the upper part of the report that the first command leaves.

python docs/report_picture.py        needs chromium, or google-chrome, and a minute
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT = 1240, 1095  # pixels of the picture


def main() -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"none of {', '.join(BROWSERS)} is installed")
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(ROOT / "configs", f"{scratch}/configs")
        subprocess.run([sys.executable, str(ROOT / "train.py")], cwd=scratch, check=True)
        picture = Path(scratch, "report.png")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        options += ["--blink-settings=preferredColorScheme=1"]  # light
        options += [f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={picture}"]
        address = Path(scratch, "logs/report.html").as_uri()
        subprocess.run([browser, *options, address], check=True, stderr=subprocess.DEVNULL)
        colours = Image.open(picture).convert("RGB").quantize(64)  # a third of the bytes
        colours.save(ROOT / "docs/report.png", optimize=True)


if __name__ == "__main__":
    main()
