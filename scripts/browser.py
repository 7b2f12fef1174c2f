"""What `make test-browser` needs beside the environment: Debian's Chromium, and the extra `browser` that drives it.

python -m scripts.browser
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("playwright", "axe_playwright_python")
BROWSERS = ("chromium", "chromium-browser")


def main() -> int:
    if not (os.environ.get("CHROMIUM") or any(shutil.which(name) for name in BROWSERS)):
        print(
            "make test-browser: Chromium is missing; on Debian: apt-get install chromium (or CHROMIUM=/path/of/one)",
            file=sys.stderr,
        )
        return 2
    if all(importlib.util.find_spec(name) for name in MODULES):
        return 0
    print("installing what drives the browser (50 MB, once)", flush=True)
    pip = [sys.executable, "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--quiet"]
    return subprocess.run([*pip, "-c", "constraints.txt", "-e", ".[browser]"], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
