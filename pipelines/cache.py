"""Where files that can be made again are kept."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder(name: str) -> Path:
    """Return the folder `name` below XDG_CACHE_HOME, else ~/.cache, made if it is not there.

    Where that cannot be written, it lies in a temporary folder of this user. Processes that start at the same moment
    share it: write elsewhere, and move in what is whole.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(home, "fasttht", name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.gettempdir(), f"fasttht-{os.getuid()}", name)
        folder.mkdir(parents=True, exist_ok=True)
    return folder
