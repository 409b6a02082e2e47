"""The lines that a user typed, across conversations and chats."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from prompt_toolkit.history import History

from quant.user_cache import user_data

KEPT = 2000  # lines that are offered again
MAX_BYTES = 16 << 20  # of the file's end that is read


class SharedHistory(History):
    """A file of JSON strings, one a line. Each is appended in one write, so several chats do not mix theirs."""

    def __init__(self, path: Path | None = None) -> None:
        super().__init__()
        self.path = path or user_data() / "history"

    def load_history_strings(self) -> Iterable[str]:
        """The latest first."""
        try:
            with self.path.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - MAX_BYTES))
                lines = file.read().split(b"\n")
        except OSError:
            return []
        return [text for line in reversed(lines[-KEPT - 1 :]) if (text := _parse(line))]

    def store_string(self, string: str) -> None:
        """A history that cannot be written is no reason to stop."""
        content = json.dumps(string).encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError:
            return
        try:
            os.write(descriptor, content)
        except OSError:
            return
        finally:
            os.close(descriptor)


def _parse(line: bytes) -> str | None:
    try:
        text = json.loads(line)
    except ValueError:
        return None
    return text if isinstance(text, str) else None
