"""Long functions in LLVM IR, which kernels call by name.

Each is compiled by itself, once, and its machine code kept on disk as a kernel's is. Inside of a kernel it would be
compiled again with every function on the way to it, because Numba makes a library of each of them.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir
from numba.core import cgutils
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target

from quant.kernels.cache import LEAVES, read_result, write_result
from quant.kernels.vector import I64


class Leaf:
    """A function of `count` int64 values. emit(builder, *values) writes its code."""

    def __init__(self, name: str, count: int, emit: Callable[..., None]):
        self.name, self._emit = f"dsr1.{name}", emit
        self._kind = ir.FunctionType(ir.VoidType(), [I64] * count)
        self._library: Any = None
        LEAVES[self.name] = self

    def declare(self, module: Any) -> Any:
        """The function for code in `module` to call; it is there by the time that the module is linked."""
        self.load()
        return cgutils.get_or_insert_function(module, self._kind, self.name)

    @global_compiler_lock
    def load(self) -> None:
        """Have the machine code in this process, under its name."""
        if self._library is not None:
            return
        codegen = cpu_target.target_context.codegen()
        stored = read_result(self.name)
        library = self._compile(codegen) if stored is None else codegen.unserialize_library(stored)
        binding.add_symbol(self.name, library.get_pointer_to_function(self.name))
        self._library = library

    def _compile(self, codegen: Any) -> Any:
        library = codegen.create_library(self.name)
        library.enable_object_caching()
        module = library.create_ir_module(self.name)
        function = ir.Function(module, self._kind, self.name)
        builder = ir.IRBuilder(function.append_basic_block("entry"))
        self._emit(builder, *function.args)
        builder.ret_void()
        library.add_ir_module(module)
        library.finalize()
        write_result(self.name, library.serialize_using_object_code())
        return library
