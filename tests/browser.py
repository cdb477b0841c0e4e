"""Where the tests find a Chromium; run with `--install` to fetch one where there is none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HOW = (
    "the report's tests need a Chromium: install your system's package (Debian: apt install chromium), or run "
    "`python -m playwright install chromium`"
)


def find_browser() -> str:
    """Return the path of a Chromium: the system's, else Playwright's own. Raises RuntimeError saying how to get one."""
    for name in NAMES:
        if path := shutil.which(name):
            return path
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        if Path(playwright.chromium.executable_path).exists():
            return playwright.chromium.executable_path
    raise RuntimeError(HOW)


def install() -> None:
    """Fetch a Chromium: by apt where that may be done without asking, else by Playwright."""
    if shutil.which("apt-get") and os.geteuid() == 0:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run(["apt-get", "update", "-qq"], check=False, **quiet)
        if subprocess.run(["apt-get", "install", "-qq", "-y", "chromium"], check=False, **quiet).returncode == 0:
            return
    subprocess.run([sys.executable, "-m", "playwright", "install", "chromium"], check=True)


if __name__ == "__main__":
    try:
        find_browser()
    except RuntimeError:
        if "--install" not in sys.argv:
            raise
        install()
        find_browser()
