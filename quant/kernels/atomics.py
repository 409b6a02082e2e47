"""What threads need to work together inside kernels: atomic words, a pause, and Linux's futex to sleep on a word.

Addresses are of 32-bit words. A plain load in a loop would be hoisted out of it; these are not.
"""

import platform
import sys
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from quant.isa import X86
from quant.kernels.vector import I32, I64, POINTER

# The numbers of futex among Linux's system calls. Elsewhere threads wait otherwise (threads.py).
FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine(), 0) if sys.platform.startswith("linux") else 0
WAIT_PRIVATE, WAKE_PRIVATE = 128, 129
EVERYBODY = 2**31 - 1


@intrinsic
def _load_word(typingctx, address):  # type: ignore[no-untyped-def]
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load_atomic(builder.inttoptr(args[0], POINTER), "seq_cst", 4, typ=I32)
        return builder.zext(value, I64)

    return types.int64(types.int64), codegen


@intrinsic
def _store_word(typingctx, address, value):  # type: ignore[no-untyped-def]
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = builder.trunc(args[1], I32)
        builder.atomic_rmw("xchg", builder.inttoptr(args[0], POINTER), word, "seq_cst")
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def _make_add(bits: ir.IntType) -> Any:
    @intrinsic
    def add(typingctx, address, value):  # type: ignore[no-untyped-def]
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            operand = builder.trunc(args[1], bits) if bits is I32 else args[1]
            before = builder.atomic_rmw("add", builder.inttoptr(args[0], POINTER), operand, "seq_cst")
            return builder.zext(before, I64) if bits is I32 else before

        return types.int64(types.int64, types.int64), codegen

    return add


@intrinsic
def _pause(typingctx):  # type: ignore[no-untyped-def]
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if X86:
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _futex(typingctx, address, operation, value):  # type: ignore[no-untyped-def]
    """The system call, without a time limit; nothing where there is none."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if FUTEX:
            kind = ir.FunctionType(I64, [I64], var_arg=True)
            system = cgutils.get_or_insert_function(builder.module, kind, "syscall")
            zero = ir.Constant(I64, 0)
            builder.call(system, [ir.Constant(I64, FUTEX), *args, zero, zero, zero])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def _call_address(typingctx, function, arguments, part, parts, sync):  # type: ignore[no-untyped-def]
    """Call the kernel at address `function`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(I64, [I64] * 4)
        return builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])

    return types.int64(*(types.int64,) * 5), codegen


@intrinsic(prefer_literal=True)
def _arguments_of(typingctx, address, count):  # type: ignore[no-untyped-def]
    """The `count` (a constant) int64 at `address`, as a tuple."""
    fields = types.UniTuple(types.int64, count.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = context.get_value_type(fields)
        return builder.load(builder.inttoptr(args[0], POINTER), typ=kind, align=8)

    return fields(types.int64, count), codegen


# The Python signatures of intrinsics have one argument more than their callers give.
arguments_of: Any = _arguments_of
load_word: Any = _load_word
store_word: Any = _store_word
add_word: Any = _make_add(I32)  # the value before
add_integer: Any = _make_add(I64)  # of 64 bits
pause: Any = _pause
futex: Any = _futex
call_address: Any = _call_address
