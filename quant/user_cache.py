"""Where a user's programs keep what they can make again, and where they keep what they cannot."""

import os
import sys
from pathlib import Path


def user_cache() -> Path:
    """dsr1's folder in the user's cache; it may not exist yet, and it may not be writable."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "dsr1"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsr1"


def user_data() -> Path:
    """dsr1's folder for what the user would miss, such as conversations; it may not exist yet."""
    if sys.platform == "win32":
        return Path(os.environ.get("APPDATA") or Path.home() / "AppData" / "Roaming") / "dsr1"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "dsr1"
