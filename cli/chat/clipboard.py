"""Text to the clipboard: by a program of the desktop, or by the terminal itself, which works over ssh, too."""

import base64
import os
import shutil
import subprocess

from cli.terminal.screen import Screen

# Programs, and the variable that says that their desktop is there.
PROGRAMS = (
    (("pbcopy",), "HOME"),
    (("wl-copy",), "WAYLAND_DISPLAY"),
    (("xclip", "-selection", "clipboard"), "DISPLAY"),
    (("xsel", "--clipboard", "--input"), "DISPLAY"),
    (("clip.exe",), "WSL_DISTRO_NAME"),
)
MAX_TERMINAL_BYTES = 74_994  # what xterm takes


def copy_text(text: str, screen: Screen) -> str:
    """Copy `text`; returns a sentence about it."""
    content = text.encode("utf-8", "replace")
    for words, variable in PROGRAMS:
        if os.environ.get(variable) and shutil.which(words[0]):
            done = subprocess.run(words, input=content, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            if done.returncode == 0:
                return f"copied {len(text):,} characters"
    if not screen.is_fancy or len(content) > MAX_TERMINAL_BYTES:
        return "there is no clipboard here; /export writes a file"
    screen.file.write(f"\x1b]52;c;{base64.b64encode(content).decode()}\x07")
    screen.file.flush()
    return f"handed {len(text):,} characters to the terminal, if it takes them (OSC 52)"
