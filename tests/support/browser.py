"""A page as a browser has understood it."""

import subprocess
from pathlib import Path


def dom(page: Path, profile: Path) -> str:
    """Chromium's document after loading a file; `profile` is a directory for it to fill."""
    command = [
        *("chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"),
        *("--dump-dom", page.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    return done.stdout
