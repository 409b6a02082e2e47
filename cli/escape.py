"""Text of models, files and networks made safe for a terminal. Needs nothing heavy, so that every command can."""

import re
import sys

# Control characters can move the cursor, rename the window or type for the user: only newline and tab pass.
UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def escape(text: str) -> str:
    """`text` with control characters made visible."""
    return UNSAFE.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def say(text: str) -> None:
    """Tell the user something beside the answer."""
    print(escape(text), file=sys.stderr)
