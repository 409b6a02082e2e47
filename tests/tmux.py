"""A terminal for tests: a program in tmux, keys that are sent to it, and the screen that comes of them."""

import os
import re
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
MISSING = shutil.which("tmux") is None
WAIT_S = 240  # a machine may be busy, or stand still for a while


class Terminal:
    """`words` run by this Python in a terminal of its own."""

    def __init__(self, words: list[str], columns: int, rows: int, env: Mapping[str, str]) -> None:
        self.server = f"dsr1-test-{uuid.uuid4().hex[:8]}"
        settings = {"LC_ALL": "C.UTF-8", "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", **env}
        pairs = [item for name, value in settings.items() for item in ("-e", f"{name}={value}")]
        size = ["-x", str(columns), "-y", str(rows)]
        self.tmux(
            "-f", os.devnull, "new-session", "-d", "-s", "main", *size, *pairs, "-c", str(ROOT), sys.executable, *words
        )
        self.tmux("set-option", "-g", "remain-on-exit", "on")

    def tmux(self, *words: str) -> str:
        command = ["tmux", "-u", "-L", self.server, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout

    def type(self, text: str) -> None:
        """Type `text` and press Enter."""
        self.tmux("send-keys", "-t", "main", "-l", text)
        self.press("Enter")

    def press(self, *keys: str) -> None:
        """Keys by tmux's names, such as C-c."""
        self.tmux("send-keys", "-t", "main", *keys)

    def paste(self, text: str) -> None:
        """As a terminal pastes, in brackets if the program asked for them."""
        self.tmux("set-buffer", "--", text)
        self.tmux("paste-buffer", "-p", "-t", "main")

    def resize(self, columns: int, rows: int) -> None:
        self.tmux("resize-window", "-t", "main", "-x", str(columns), "-y", str(rows))

    def screen(self, styled: bool = False, history: bool = False) -> str:
        """What is to be seen. styled: with escape sequences. history: with what has scrolled off."""
        options = [*(["-e"] if styled else []), *(["-S", "-"] if history else [])]
        return self.tmux("capture-pane", "-p", "-t", "main", *options)

    def wait_for(self, pattern: str, count: int = 1, history: bool = True) -> str:
        """The screen, once `pattern` stands there `count` times."""
        deadline = time.monotonic() + WAIT_S
        while True:
            screen = self.screen(history=history)
            if len(re.findall(pattern, screen, re.MULTILINE)) >= count:
                return screen
            assert time.monotonic() < deadline, f"{pattern!r} did not come:\n{screen}"
            time.sleep(0.05)

    def wait_for_end(self) -> None:
        """Until the program has ended."""
        deadline = time.monotonic() + WAIT_S
        while self.tmux("list-panes", "-t", "main", "-F", "#{pane_dead}").strip() != "1":
            assert time.monotonic() < deadline, f"the program goes on:\n{self.screen()}"
            time.sleep(0.05)

    def close(self) -> None:
        subprocess.run(["tmux", "-L", self.server, "kill-server"], capture_output=True)
