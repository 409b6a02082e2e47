"""Whether the order of what was queued is enough, whatever a device does with the freedom that is left to it.

Streams run beside each other but for events, so an operation happens before another only if it stands before it on
one stream, or an event or a synchronisation says so. A vector clock holds this: for each stream, how many operations
of every stream are surely done (Mattern, "Virtual Time and Global States of Distributed Systems", 1989). Then

    a read     needs its buffer's last write to have happened before, and one that there was
    a write    needs its buffer's last write and all reads since to have happened before
    a free     is a write by `main`, which gets the memory next; whatever touches the buffer later, a graph that was
               recorded with its address, say, touches another's memory
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from offload.recording import Operation

Clock = dict[str, int]
WORK = ("copy", "launch", "run", "replay", "free")


@dataclass
class _Buffer:
    """What happened to a buffer. written: stream and number of the last write. read: last reads since, by stream."""

    allocated: bool = False  # and therefore without contents; weights and inputs come with theirs
    written: tuple[str, int] | None = None
    read: dict[str, int] = field(default_factory=dict)
    freed: bool = False


class _Checker:
    def __init__(self) -> None:
        self.clocks: dict[str, Clock] = {}
        self.events: dict[int, Clock] = {}
        self.buffers: dict[int, _Buffer] = {}
        self.base: Clock = {}  # what the host knows to be done, and so all that it queues from here on
        self.found: list[str] = []

    def add(self, number: int, operation: Operation) -> None:
        clock = self.clocks.setdefault(operation.stream, {})
        _join(clock, self.base)
        if operation.kind == "record":
            self.events[operation.event] = dict(clock)
        elif operation.kind == "wait":
            _join(clock, self.events.get(operation.event, {}))
        elif operation.kind == "synchronize":
            for other in self.clocks.values():
                _join(self.base, other)
        elif operation.kind == "allocate":
            self.buffers[operation.writes[0]] = _Buffer(allocated=True)
        elif operation.kind in WORK:
            clock[operation.stream] = clock.get(operation.stream, 0) + 1
            self._touch(f"{operation.kind} {number} on {operation.stream}", operation, clock)

    def _touch(self, what: str, operation: Operation, clock: Clock) -> None:
        for name in operation.reads:
            buffer = self.buffers.setdefault(name, _Buffer())
            self._check_read(what, name, buffer, clock)
        for name in operation.writes:
            buffer = self.buffers.setdefault(name, _Buffer())
            self._check_write(what, name, buffer, clock)
        now = clock[operation.stream]
        for name in operation.reads:
            self.buffers[name].read[operation.stream] = now
        for name in operation.writes:
            buffer = self.buffers[name]
            buffer.written, buffer.read = (operation.stream, now), {}
            buffer.freed = operation.kind == "free"

    def _check_read(self, what: str, name: int, buffer: _Buffer, clock: Clock) -> None:
        if buffer.freed:
            self.found.append(f"{what} reads buffer {name}, which was freed: a stale address")
        elif buffer.written is None and buffer.allocated:
            self.found.append(f"{what} reads buffer {name} before anything was queued that writes it")
        elif buffer.written is not None and not _done(buffer.written, clock):
            self.found.append(f"{what} reads buffer {name} before its write on {buffer.written[0]} is surely done")

    def _check_write(self, what: str, name: int, buffer: _Buffer, clock: Clock) -> None:
        if buffer.freed:
            self.found.append(f"{what} writes buffer {name}, which was freed: a stale address")
            return
        users = [*buffer.read.items(), *([buffer.written] if buffer.written is not None else [])]
        for user in users:
            if not _done(user, clock):
                self.found.append(f"{what} writes buffer {name} before its use on {user[0]} is surely done")


def _join(clock: Clock, other: Clock) -> None:
    for stream, count in other.items():
        clock[stream] = max(clock.get(stream, 0), count)


def _done(use: tuple[str, int], clock: Clock) -> bool:
    stream, number = use
    return clock.get(stream, 0) >= number


def violations(operations: Sequence[Operation]) -> list[str]:
    """A sentence for each pair of uses of a buffer that has no order, and for each use of a buffer without contents."""
    checker = _Checker()
    for number, operation in enumerate(operations):
        checker.add(number, operation)
    return checker.found
