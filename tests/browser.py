"""A page as a real browser shows it: Debian's chromium."""

import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

WIDTH, BAND = 1100, 200


class Shown:
    """A page in a window so many pixels high, and its text after the browser has read it. It must fetch nothing."""

    def __init__(self, page, folder, height):
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        if chromium is None:
            pytest.skip("chromium is not installed; .ci/run installs Debian's")
        assert not re.search(r"(src|href)=\"(?!data:|#)", page.read_text()), "the page fetches something"
        picture = folder / "page.png"
        browse = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
        browse += ["--hide-scrollbars", f"--window-size={WIDTH},{height}"]

        def browsed(what):
            return subprocess.run([*browse, what, page.as_uri()], check=True, capture_output=True, timeout=600).stdout

        browsed(f"--screenshot={picture}")
        self.pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
        assert self.pixels.shape[:2] == (height, WIDTH)
        self.text = browsed("--dump-dom").decode()

    def count(self, red, green, blue):
        """Pixels of about this colour."""
        return int((np.abs(self.pixels - (red, green, blue)).sum(axis=2) < 30).sum())

    def bands_without_ink(self):
        """Of 200 pixels' height."""
        dark = (self.pixels.sum(axis=2) < 400).reshape(-1, BAND * WIDTH).sum(axis=1)
        return int((dark <= 100).sum())
