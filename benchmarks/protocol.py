"""A worker's side of its pipe. It runs in a peer's environment, so it needs nothing but Python.

A worker makes its weights, says that it is ready, and then answers each line on standard input, "run 512" as it might
be, with one line of JSON on standard output, after MARK; libraries print other lines. It ends when its input does.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

MARK = "dsr1-benchmark: "

Fields = dict[str, Any]
Command = Callable[..., Fields]


def serve(start: Callable[[], tuple[Fields, Mapping[str, Command]]]) -> None:
    """Answer commands until standard input ends.

    start: makes the weights; returns what to tell the driver of them, and the commands, each of which takes whole
    numbers and returns what to answer.
    """
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what is printed from now on goes to the log
    about, commands = start()
    print(MARK + json.dumps(about), file=replies, flush=True)
    for line in sys.stdin:
        name, *numbers = line.split()
        print(MARK + json.dumps(commands[name](*map(int, numbers))), file=replies, flush=True)
    os._exit(0)  # some peers' threads never end


def timed(work: Callable[[], object], nbytes: int = 0) -> Fields:
    """How long a call took, and the bytes of weights that it read."""
    begin = time.perf_counter()
    work()
    return {"seconds": time.perf_counter() - begin, "bytes": nbytes}
