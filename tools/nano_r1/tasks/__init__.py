"""The six tasks of nano-r1."""

from __future__ import annotations

from .arithmetic import Add, Multiply, Subtract
from .base import Task
from .compare import Compare
from .count import CountTask
from .countdown import CountdownTask

_ALL: list[Task] = [Add(), Subtract(), Multiply(), Compare(), CountTask(), CountdownTask()]
TASKS: dict[str, Task] = {task.name: task for task in _ALL}
