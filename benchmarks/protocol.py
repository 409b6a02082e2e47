"""A worker's side of its pipe. It runs in a peer's environment, so it needs nothing but Python.

A worker makes its weights, says that it is ready, and then answers each line on standard input, "run 512" as it might
be, with one line of JSON on standard output. It ends when its input does.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

Fields = dict[str, Any]
Command = Callable[..., Fields]


def serve(start: Callable[[], tuple[Fields, Mapping[str, Command]]]) -> None:
    """Answer commands until standard input ends.

    start: makes the weights; returns what to tell the driver of them, and the commands, each of which takes whole
    numbers and returns what to answer.
    """
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries print what they like, also from C++
    about, commands = start()
    print(json.dumps(about), file=replies)
    for line in sys.stdin:
        name, *numbers = line.split()
        print(json.dumps(commands[name](*map(int, numbers))), file=replies)
    replies.flush()
    os._exit(0)  # some peers' threads never end


def timed(work: Callable[[], object], nbytes: int = 0) -> Fields:
    """How long a call took, and the bytes of weights that it read."""
    begin = time.perf_counter()
    work()
    return {"seconds": time.perf_counter() - begin, "bytes": nbytes}
