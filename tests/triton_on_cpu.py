"""Lets `jax_triton.triton_call` run on the CPU, through Triton's interpreter.

Importing this module adds a CPU lowering to jax-triton's primitive, so that functions of
`aim_jax.ops.triton` run on CPU inside `jit` and `lax.scan`, at about a thousandth of a GPU's speed.
Lowering for CUDA is not touched. Neither torch nor TRITON_INTERPRET is needed.

Outputs that alias no input hold NaN (integers: the smallest one) before the kernel runs, so that
anything it fails to write shows.
"""

import contextlib
import functools
import threading
from unittest import mock

import jax
import ml_dtypes
import numpy as np
import triton.language as tl
from jax.interpreters import mlir
from jax_triton.triton_lib import get_triton_type, normalize_grid, triton_kernel_call_p
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

ONE_AT_A_TIME = threading.Lock()  # devices run kernels in threads, and the interpreter is global


class Pointer:
    """What the interpreter asks of a tensor: where it is and what it holds."""

    def __init__(self, array):
        assert array.flags.c_contiguous and array.flags.writeable
        self.array = array
        self.dtype = get_triton_type(jax.core.ShapedArray((), array.dtype)).removeprefix("*")

    def data_ptr(self):
        return self.array.ctypes.data


class Executor(interpreter.GridExecutor):
    """Runs a kernel where its arguments are, instead of on copies made through torch."""

    def _init_args_hst(self, args_dev, kwargs):
        return args_dev, kwargs

    def _restore_args_dev(self, *args):
        pass


@functools.cache
def interpreted(function):
    """The interpreted form of a Python function that `triton.jit` has decorated."""
    return interpreter.InterpretedFunction(function).rewrite()


def convert_float(values, input_dtype, output_dtype, rounding_mode):
    """Casts as the hardware does: Triton 3.7 interprets a cast to bfloat16 as a truncation."""
    kinds = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16, "fp32": np.float32}
    values = np.ascontiguousarray(values).view(kinds[input_dtype.name])
    output = values.astype(kinds[output_dtype.name])
    return output.view(np.uint16 if output.itemsize == 2 else np.uint32)


def create_dot(builder, a, b, *args):
    """Multiplies values of bfloat16; Triton 3.7 interprets products of the bits that hold them."""
    return CREATE_DOT(builder, *map(as_float32, (a, b)), *args)


CREATE_DOT = interpreter.InterpreterBuilder.create_dot


def as_float32(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    values = handle.data.view(ml_dtypes.bfloat16).astype(np.float32)
    return interpreter.TensorHandle(values, tl.float32)


@contextlib.contextmanager
def interpreter_in_use():
    """Inside, kernels may call other `triton.jit` functions, Triton's own included.

    The interpreter replaces the builtins of the language. It does so for a kernel by itself, and
    here, once, for the functions of `triton.language.standard`, which see them through another
    module; done at each of their calls it would take most of the time.
    """
    call = lambda kernel, *args, **kwargs: interpreted(kernel.fn)(*args, **kwargs)  # noqa: E731
    scope = interpreter._patch_lang(tl.sum.fn)
    with (
        contextlib.ExitStack() as stack,
        mock.patch.object(JITFunction, "__call__", call),
        mock.patch.object(interpreter, "_convert_float", convert_float),
        mock.patch.object(interpreter.InterpreterBuilder, "create_dot", create_dot),
        np.errstate(all="ignore"),  # exp(-inf), 1 / inf
    ):
        stack.callback(scope.restore)
        yield


def poisoned(shape, dtype):
    integer = np.issubdtype(dtype, np.integer)
    return np.full(shape, np.iinfo(dtype).min if integer else np.nan, dtype)


def run(*arrays, fn, scalar_args, out_shapes, grid, input_output_aliases, constants):
    """Runs kernel `fn` over its grid on host arrays; returns the outputs."""
    assert not scalar_args
    inputs = [np.array(array) for array in arrays]
    outputs = [poisoned(out.shape, out.dtype) for out in out_shapes]
    for source, target in input_output_aliases:
        outputs[target] = inputs[source]
    with ONE_AT_A_TIME, interpreter_in_use():
        executor = Executor(interpreted(fn.fn), fn.arg_names, normalize_grid(grid, constants))
        executor(*[Pointer(array) for array in inputs + outputs], **constants)
    return tuple(outputs)


def call_back(*arrays, fn, scalar_args, out_shapes, grid, input_output_aliases, **params):
    constants = {name: params[name] for name in fn.arg_names if name in params}
    host = functools.partial(
        run, fn=fn, scalar_args=scalar_args, out_shapes=out_shapes, grid=grid,
        input_output_aliases=input_output_aliases, constants=constants,
    )  # fmt: skip
    return jax.pure_callback(host, out_shapes, *arrays)


mlir.register_lowering(
    triton_kernel_call_p, mlir.lower_fun(call_back, multiple_results=True), platform="cpu"
)
