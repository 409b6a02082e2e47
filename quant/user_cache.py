"""Where a user's programs keep what they can make again."""

import os
import sys
from pathlib import Path


def user_cache() -> Path:
    """dsr1's folder in the user's cache; it may not exist yet, and it may not be writable."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "dsr1"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsr1"
