"""The folder of a user's conversations: a file each, found by name, by the beginning of its id, or as the latest."""

import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from hybrid_rt.conversation import Conversation
from hybrid_rt.event_log import EventLog, is_in_use, read_events
from quant.errors import Dsr1Error
from quant.user_cache import user_data

SUFFIX = ".jsonl"
ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{4}")


@dataclass(frozen=True)
class Saved:
    """A conversation on disk. changed: seconds since the epoch."""

    id: str
    path: Path
    conversation: Conversation
    changed: float

    @property
    def is_open(self) -> bool:
        """Whether some chat is at it."""
        return is_in_use(self.path)


class SavedConversations:
    """Reads the folder anew at each call, since other chats write there."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or user_data() / "sessions"

    def new_path(self) -> Path:
        """Where a conversation that begins now goes."""
        return self.folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}{SUFFIX}"

    def open(self, saved: Saved) -> EventLog:
        """Continue one. Raises InUseError if another chat has it."""
        return EventLog.open(saved.path)

    def list(self) -> list[Saved]:
        """All that hold a question, the latest first."""
        found = [_load(path) for path in self.folder.glob(f"*{SUFFIX}") if ID.fullmatch(path.stem)]
        return sorted((s for s in found if s.conversation.turns), key=lambda s: (s.changed, s.id), reverse=True)

    def latest(self) -> Saved | None:
        """The latest that no other chat is at."""
        return next((saved for saved in self.list() if not saved.is_open), None)

    def find(self, wanted: str) -> Saved:
        """By name or by the beginning of the id. Raises Dsr1Error if there is none, or more than one."""
        found = self.list()
        matches = [s for s in found if s.conversation.name == wanted] or [s for s in found if s.id.startswith(wanted)]
        if len(matches) == 1 or matches and matches[0].conversation.name == wanted:
            return matches[0]
        if matches:
            raise Dsr1Error(f"{len(matches)} conversations begin with {wanted}; give more of the id (/sessions)")
        raise Dsr1Error(f"there is no conversation {wanted}; /sessions lists those that there are")


def _load(path: Path) -> Saved:
    try:
        changed = path.stat().st_mtime
    except OSError:
        changed = 0.0
    return Saved(path.stem, path, Conversation.replay(read_events(path)), changed)
