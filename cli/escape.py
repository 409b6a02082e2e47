"""Text of models, files and networks made safe for a terminal. Needs nothing heavy, so that every command can."""

import re
import sys

# Control characters can move the cursor, rename the window or type for the user: only newline and tab pass. Nor do
# separators of lines, marks that turn the direction of writing, and halves of characters, which no terminal takes.
UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escape(text: str) -> str:
    """`text` with control characters made visible."""
    return UNSAFE.sub(lambda match: visible(ord(match[0])), text)


def visible(code: int) -> str:
    """A character that must not reach the terminal, written out."""
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def say(text: str) -> None:
    """Tell the user something beside the answer."""
    print(escape(text), file=sys.stderr)
