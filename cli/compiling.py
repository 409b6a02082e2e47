"""What a user sees while kernels are compiled for the first time on a machine."""

import sys

from cli.escape import say

ERASE_LINE = "\r\x1b[K"


def show_compiling(done: int, total: int) -> None:
    """A line on standard error that goes away on a terminal; elsewhere a line for each kernel. (`Steps`)"""
    if done == total:
        if sys.stderr.isatty():
            print(ERASE_LINE, end="", file=sys.stderr, flush=True)
        return
    text = f"compiling kernels for this processor, once: {done + 1} of {total} ..."
    if sys.stderr.isatty():
        print(f"{ERASE_LINE}{text}", end="", file=sys.stderr, flush=True)
    else:
        say(text)
