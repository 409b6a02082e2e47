"""A pass through the model as a list of kernel calls, made again without Python between them.

A token's pass calls some hundred kernels, and between two of them Python and torch take tens of microseconds when the
weights have pushed their code out of the caches. But from one token to the next little changes: every buffer, matrix
and size is the same, and what is not grows by the same amount each token (the number of cached tokens, the address of
the next one's place). So three passes are recorded, each in the same memory; what the first two say of the third must
be true; and from then on a pass is one call that runs the list.

Recording is strict: all that computes must be an operator of `dsr1`, whose kernels are seen, or a view.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quant.kernels import threads
from quant.kernels.jit import Kernel

PASSES = 3  # that are recorded


class NotRecordableError(Exception):
    """A pass computed something outside of the kernels, or not in the memory of the pass before."""


class KernelCall(NamedTuple):
    """One call of quant/kernels/threads.py."""

    function: int
    arguments: tuple[int, ...]
    parts: int


class Recording:
    """The kernel calls of one pass and the tensors that they work in. earlier: the pass whose tensors to take again."""

    def __init__(self, earlier: "Recording | None" = None) -> None:
        self.calls: list[KernelCall] = []
        self.tensors: list[Tensor] = []
        self._earlier = None if earlier is None else iter(earlier.tensors)
        self._scratch: dict[tuple[int, torch.dtype], Tensor] = {} if earlier is None else earlier._scratch
        self.allocating = False

    def note(self, kernel: Kernel, arguments: tuple[int, ...], parts: int) -> None:
        """Keep a call that is about to be made."""
        self.calls.append(KernelCall(kernel.address, arguments, parts))

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory that no later pass but those of the same list will use."""
        if self._earlier is not None:
            tensor = next(self._earlier, None)
            if tensor is None or tensor.shape != shape or tensor.dtype != dtype:
                raise NotRecordableError(f"another pass had no tensor {shape} of {dtype} here")
        else:
            tensor = self._allocate(shape, dtype)
        self.tensors.append(tensor)
        return tensor

    def scratch(self, count: int, dtype: torch.dtype) -> Tensor:
        """Memory for one call alone; another call may get the same."""
        if (count, dtype) not in self._scratch:
            self._scratch[count, dtype] = self._allocate((count,), dtype)
        return self._scratch[count, dtype]

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        self.allocating = True
        try:
            return torch.empty(shape, dtype=dtype)
        finally:
            self.allocating = False


class _Current(threading.local):
    recording: Recording | None = None


_current = _Current()


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """torch.empty on the host, for the results of operators."""
    recording = _current.recording
    return torch.empty(shape, dtype=dtype) if recording is None else recording.empty(shape, dtype)


def scratch(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """`count` values on the host, for use within one call of a kernel."""
    recording = _current.recording
    return torch.empty(count, dtype=dtype) if recording is None else recording.scratch(count, dtype)


def call(kernel: Kernel, arguments: tuple[int, ...], parts: int) -> int:
    """threads.call, seen by a recording."""
    if _current.recording is not None:
        _current.recording.note(kernel, arguments, parts)
    return threads.call(kernel, arguments, parts)


def leave_to_torch(what: str) -> None:
    """Said before an operator computes something without a kernel. Raises NotRecordableError in a recording."""
    if _current.recording is not None:
        raise NotRecordableError(what)


@contextmanager
def recording(earlier: Recording | None = None) -> Iterator[Recording]:
    """Record what this thread runs inside. Raises NotRecordableError from the place where something is no kernel's."""
    _current.recording = Recording(earlier)
    try:
        with _OnlyKernels(_current.recording):
            yield _current.recording
    finally:
        _current.recording = None


class _OnlyKernels(TorchDispatchMode):
    """Refuses operators that compute, other than ours."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else torch would import its compiler, 873 modules and a second, at the first token that is recorded."""
        return False

    def __init__(self, of: Recording) -> None:
        super().__init__()
        self.of = of

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace != "dsr1" and not self.of.allocating and _computes(func, args, out):
            raise NotRecordableError(str(func))
        return out


def _computes(func: Any, args: Any, out: Any) -> bool:
    """Whether an operator returns anything but views of its inputs and the inputs themselves, or changes one."""
    known = {leaf.untyped_storage()._cdata for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
    made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
    return func._schema.is_mutable or any(leaf.untyped_storage()._cdata not in known for leaf in made)


class Tape:
    """The passes that follow three recorded ones, each a step further. `run(0)` is the last of them once more.

    Raises NotRecordableError if the passes do not differ by the same amounts.
    """

    def __init__(self, passes: list[Recording]) -> None:
        first, second, third = (
            np.array([value for call in each.calls for value in call.arguments], np.int64) for each in passes
        )
        shapes = [[(call.function, len(call.arguments), call.parts) for call in each.calls] for each in passes]
        if shapes[0] != shapes[1] or shapes[1] != shapes[2] or not np.array_equal(third - second, second - first):
            raise NotRecordableError("the passes are not alike")
        self.recording, self.arguments = passes[-1], third.copy()
        self.changing = np.flatnonzero(third != second)
        self.base, self.step = third[self.changing], (third - second)[self.changing]
        ends = np.cumsum([length for _, length, _ in shapes[0]])
        starts = self.arguments.ctypes.data + 8 * (ends - [length for _, length, _ in shapes[0]])
        rows = zip(shapes[0], starts.tolist(), strict=True)
        self.calls = np.array([[function, start, parts] for (function, _, parts), start in rows], np.int64)

    def run(self, steps: int) -> None:
        """Make the calls of the pass `steps` after the last recorded one, or before it."""
        self.arguments[self.changing] = self.base + steps * self.step
        threads.call_all(self.calls)


class Repeated:
    """A pass that is recorded when it first runs at three positions in a row, and played from then on.

    Between two runs only the contents of the memory that the pass reads may change, and the position.
    """

    def __init__(self) -> None:
        self.passes: list[Recording] = []
        self.position = 0  # of the last pass that was recorded
        self.result: Tensor | None = None
        self.tape: Tape | None = None
        self.possible = True

    def run(self, position: int, work: Callable[[], Tensor]) -> Tensor:
        """The result of work(), the pass at `position`; the next run overwrites it."""
        if self.tape is not None and self.result is not None:
            self.tape.run(position - self.position)
            return self.result
        if not self.possible:
            return work()
        try:
            return self._record(position, work)
        except NotRecordableError:
            self.possible = False
            return work()

    def _record(self, position: int, work: Callable[[], Tensor]) -> Tensor:
        if self.passes and position != self.position + 1:
            self.passes = []
        with recording(self.passes[-1] if self.passes else None) as made:
            self.result = work()
        self.passes.append(made)
        self.position = position
        if len(self.passes) == PASSES:
            self.tape, self.passes = Tape(self.passes), []
        return self.result
