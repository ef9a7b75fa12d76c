"""How kernels are compiled: the one decorator, the array types, and software prefetch.

Flags are the same for every kernel: the GIL is released, the machine code is cached on disk, integer
arithmetic wraps, float arithmetic is IEEE (no fastmath), and nothing is parallel inside - threads run whole
kernels on disjoint shards. Signatures are explicit, so there is exactly one compiled version of each kernel
and none is compiled in the middle of a stream. Input columns are declared read-only: Arrow's are, and a
writable array may be passed where a read-only one is expected, not the other way round.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import types
from numba.core import cgutils
from numba.core.extending import intrinsic
from numba.core.typing.templates import Signature

from engine.kernels.layout import MARK_EPOCHS, MARK_LANES, MARKED

i64 = types.int64
f64 = types.float64
u64 = types.uint64
boolean = types.boolean


def array(dtype: Any) -> Any:
    """A one-dimensional contiguous array that the kernel may write."""
    return types.Array(dtype, 1, "C")


def column(dtype: Any) -> Any:
    """A one-dimensional contiguous array that the kernel only reads."""
    return types.Array(dtype, 1, "C", readonly=True)


I64, U64, U32, I32, U8, F64 = (array(t) for t in (i64, u64, types.uint32, types.int32, types.uint8, f64))
I64_IN, U64_IN, I32_IN, U8_IN = (column(t) for t in (i64, u64, types.int32, types.uint8))

#: `_nrt=False`: kernels make and keep no arrays, so Numba need not count references to them; each count is an atomic instruction, and
#: there were several per row. `error_model`: a division by zero, which no kernel does, need not be looked out for.
#: Nobody calls them from C, so no entry for that is compiled.
_FLAGS: Any = {"nogil": True, "error_model": "numpy", "_nrt": False, "no_cfunc_wrapper": True}

#: Whether machine code is kept on disk: until a folder for it was looked for in vain.
_cached = [True]

#: Stands for the source of all kernels. Numba compiles anew when the file of a kernel changes, but not for the files of what it inlines.
_SOURCE = hashlib.blake2b(b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))), digest_size=8).hexdigest()

#: Every compiled kernel, by name: a test asserts that each has one signature.
KERNELS: dict[str, Any] = {}


def kernel(result: Any, *arguments: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function for exactly these types."""

    def compiled(function: Callable[..., Any]) -> Any:
        signature = Signature(result, arguments, None)
        if numba.config.DISABLE_JIT:
            return function
        function.__qualname__ += f"_{_SOURCE}"  # names the file of its machine code
        try:
            dispatcher = numba.njit(signature, cache=_cached[0], **_FLAGS)(function)
        except RuntimeError as error:  # no folder is writable: where told, beside the package, or the user's
            if "cannot cache function" not in str(error):
                raise
            warnings.warn(
                "riskring compiles at every start, which takes seconds: no folder for compiled code is writable; set NUMBA_CACHE_DIR",
                RuntimeWarning,
                stacklevel=2,
            )
            _cached[0] = False  # said once
            dispatcher = numba.njit(signature, **_FLAGS)(function)
        KERNELS[function.__name__] = dispatcher
        return dispatcher

    return compiled


#: Small functions that kernels share; LLVM inlines them. Python never calls them, so that a fifth of the time to compile can be saved.
inline = numba.njit(forceinline=True, no_cpython_wrapper=True, **_FLAGS)


def _address(context: Any, builder: Any, array_type: Any, array: Any, position: Any) -> Any:
    """Pointer to an element of an array."""
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [position])


@intrinsic  # type: ignore[misc, unused-ignore]
def _prefetch(typing_context: Any, target: Any, position: Any) -> Any:
    signature = types.void(target, types.int64)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _address(context, builder, signature.args[0], *arguments)
        address = builder.bitcast(pointer, cgutils.voidptr_t)
        kind = cgutils.ir.FunctionType(cgutils.ir.VoidType(), [cgutils.voidptr_t, cgutils.int32_t, cgutils.int32_t, cgutils.int32_t])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        read_or_write, locality, data_cache = (cgutils.int32_t(value) for value in (1, 3, 1))
        builder.call(function, [address, read_or_write, locality, data_cache])
        return context.get_dummy_value()

    return signature, codegen


@intrinsic  # type: ignore[misc, unused-ignore]
def _lanes_equal(typing_context: Any, words: Any, position: Any, mask: Any, wanted: Any) -> Any:
    signature = types.int64(words, types.int64, types.int64, types.int64)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lane = cgutils.int32_t
        vector = cgutils.ir.VectorType(lane, LANES)
        none = cgutils.ir.Constant(vector, cgutils.ir.Undefined)
        everywhere = cgutils.ir.Constant(vector, [0] * LANES)

        def spread(value: Any) -> Any:
            return builder.shuffle_vector(builder.insert_element(none, builder.trunc(value, lane), lane(0)), none, everywhere)

        pointer = _address(context, builder, signature.args[0], *arguments[:2])
        line = builder.load(builder.bitcast(pointer, vector.as_pointer()), align=4)
        equal = builder.icmp_unsigned("==", builder.and_(line, spread(arguments[2])), spread(arguments[3]))
        return builder.zext(builder.bitcast(equal, cgutils.ir.IntType(LANES)), cgutils.ir.IntType(64))

    return signature, codegen


@intrinsic  # type: ignore[misc, unused-ignore]
def _marks_due(typing_context: Any, marks: Any, position: Any, before: Any) -> Any:
    signature = types.int64(marks, types.int64, types.int64)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lane = cgutils.ir.IntType(8)
        vector = cgutils.ir.VectorType(lane, MARK_LANES)
        none = cgutils.ir.Constant(vector, cgutils.ir.Undefined)
        everywhere = cgutils.ir.Constant(cgutils.ir.VectorType(cgutils.int32_t, MARK_LANES), [0] * MARK_LANES)

        def spread(value: Any) -> Any:
            return builder.shuffle_vector(builder.insert_element(none, value, cgutils.int32_t(0)), none, everywhere)

        pointer = _address(context, builder, signature.args[0], *arguments[:2])
        line = builder.load(builder.bitcast(pointer, vector.as_pointer()), align=MARK_LANES)
        passed = builder.and_(builder.sub(spread(builder.trunc(arguments[2], lane)), line), spread(lane(MARKED - 1)))
        marked = builder.icmp_unsigned(">=", line, spread(lane(MARKED)))
        due = builder.icmp_unsigned("<", builder.sub(passed, spread(lane(1))), spread(lane(MARK_EPOCHS - 2)))
        return builder.bitcast(builder.and_(due, marked), cgutils.ir.IntType(64))

    return signature, codegen


@intrinsic  # type: ignore[misc, unused-ignore]
def _lowest_bit(typing_context: Any, word: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], cgutils.false_bit)

    return types.int64(types.int64), codegen


@intrinsic  # type: ignore[misc, unused-ignore]
def _natural(typing_context: Any, number: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = cgutils.ir.FunctionType(cgutils.ir.VoidType(), [cgutils.ir.IntType(1)])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.assume")
        builder.call(function, [builder.icmp_signed(">=", arguments[0], arguments[0].type(0))])
        return arguments[0]

    return types.int64(types.int64), codegen


@intrinsic  # type: ignore[misc, unused-ignore]
def _bits_set(typing_context: Any, word: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.int64(types.int64), codegen


def _prefetch_plain(target: Any, position: Any) -> None:
    """What an uncompiled kernel, which is plain Python, does instead."""


def _lanes_equal_plain(words: Any, position: Any, mask: int, wanted: int) -> int:
    return sum(1 << lane for lane in range(LANES) if int(words[position + lane]) & mask == wanted)


def _marks_due_plain(marks: Any, position: Any, before: Any) -> Any:
    epochs = range(1, MARK_EPOCHS - 1)
    found = (int(marks[position + lane]) for lane in range(MARK_LANES))
    bits = sum(1 << lane for lane, mark in enumerate(found) if mark >= MARKED and (int(before) - mark) % MARKED in epochs)
    return np.int64(bits - (bits >> 63 << 64))  # which wraps around as the machine's does


def _lowest_bit_plain(word: Any) -> int:
    return (int(word) & -int(word)).bit_length() - 1 if word else 64


def _bits_set_plain(word: Any) -> int:
    return (int(word) & (2**64 - 1)).bit_count()


def _natural_plain(number: Any) -> Any:
    assert number >= 0, f"{number} is not natural"
    return number


#: Lanes of `lanes_equal`: 32-bit words that fill one 64-byte line.
LANES = 16

_plain = numba.config.DISABLE_JIT

#: prefetch(target, position): ask for the memory line of target[position], to be written. Never faults, never waits.
prefetch: Any = _prefetch_plain if _plain else _prefetch

#: lanes_equal(words, position, mask, wanted): bit k is set where words[position + k] & mask == wanted, for 16 lanes in a few vector
#: instructions. `words` is uint32; position a multiple of 16.
lanes_equal: Any = _lanes_equal_plain if _plain else _lanes_equal

#: marks_due(marks, position, before): bit k is set where marks[position + k] is that of an epoch before the epoch `before`, and by less
#: than MARK_EPOCHS - 1 epochs, for 64 lanes. `marks` is uint8; position a multiple of 64.
marks_due: Any = _marks_due_plain if _plain else _marks_due

#: lowest_bit(word): number of the lowest bit set in an int64; 64 if none is.
lowest_bit: Any = _lowest_bit_plain if _plain else _lowest_bit

#: natural(number): the number, which is known not to be negative: an array indexed by it need not be indexed from behind (what Numba
#: provides for takes three instructions an access). Where it is negative after all the outcome is undefined; plain Python asserts it.
natural: Any = _natural_plain if _plain else _natural

#: bits_set(word): number of bits set in an int64.
bits_set: Any = _bits_set_plain if _plain else _bits_set
