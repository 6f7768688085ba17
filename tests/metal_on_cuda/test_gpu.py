"""Test the launches on a GPU with a stand-in for CUDA's driver, whose device memory is the host's."""

from __future__ import annotations

import ctypes

import mlx.core as mx
import numpy as np
import pytest

from metal_on_cuda.gpu import Gpu
from metal_on_cuda.kernel import Launch, Recorder, factory
from metalens import use_backend
from metalens.ops.metal import kernel as metal_kernel
from support import metal_cells
from support.metal_emulation import M1


class Driver:
    """The driver's functions. Its only kernel writes the first input, plus one, to the second output."""

    def __init__(self):
        self.blocks: dict[int, ctypes.Array] = {}
        self.launched = []

    def __getattr__(self, name):  # whatever needs no answer
        assert name in (
            "cuInit",
            "cuDeviceGet",
            "cuDevicePrimaryCtxRetain",
            "cuCtxSetCurrent",
            "cuModuleLoadData",
            "cuModuleGetFunction",
            "cuCtxSynchronize",
        )
        return lambda *_: 0

    def cuDeviceGetName(self, name, length, device):  # noqa: N802
        name.value = b"Stand-in"
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):  # noqa: N802
        value._obj.value = {75: 9, 76: 0}[attribute]
        return 0

    def cuGetErrorString(self, status, text):  # noqa: N802
        text._obj.value = b"out of memory"
        return 0

    def cuMemAlloc_v2(self, pointer, size):  # noqa: N802
        if size.value > 1 << 20:
            return 2
        block = ctypes.create_string_buffer(size.value)
        pointer._obj.value = ctypes.addressof(block)
        self.blocks[pointer._obj.value] = block
        return 0

    def cuMemFree_v2(self, pointer):  # noqa: N802
        del self.blocks[pointer.value]
        return 0

    def cuMemcpyHtoD_v2(self, to, source, size):  # noqa: N802
        ctypes.memmove(to.value, source.value, size.value)
        return 0

    def cuMemcpyDtoH_v2(self, to, source, size):  # noqa: N802
        ctypes.memmove(to.value, source.value, size.value)
        return 0

    def cuMemsetD8_v2(self, to, value, size):  # noqa: N802
        ctypes.memset(to.value, value.value, size.value)
        return 0

    def cuLaunchKernel(self, function, gx, gy, gz, tx, ty, tz, shared, stream, parameters, extra):  # noqa: N802
        self.launched.append(((gx, gy, gz), (tx, ty, tz)))
        pointers = [ctypes.c_uint64.from_address(p).value for p in parameters]
        given = np.ctypeslib.as_array((ctypes.c_float * 4).from_address(pointers[0]))
        np.ctypeslib.as_array((ctypes.c_float * 4).from_address(pointers[-1]))[:] = given + 1
        return 0


def launch(shape=(4,)):
    return Launch(
        "k",
        "text",
        (np.arange(4, dtype=np.float32), np.zeros(0, np.int32)),
        (shape, (2, 2)),
        (np.dtype(np.uint16), np.dtype(np.float32)),
        (3, 2, 1),
        (64, 1, 1),
    )


def test_a_launch_moves_its_buffers_and_frees_them():
    driver = Driver()
    gpu = Gpu(driver)
    assert (gpu.name, gpu.architecture) == ("Stand-in", "sm_90")
    untouched, written = gpu.run(launch(), b"image")
    assert untouched.tolist() == [0xFFFF] * 4, "what a kernel does not write is NaN"
    assert written.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert driver.launched == [((3, 2, 1), (64, 1, 1))]
    assert driver.blocks == {}


def test_an_error_names_the_call_and_frees_the_buffers():
    driver = Driver()
    with pytest.raises(RuntimeError, match=r"cuMemAlloc_v2: out of memory \(2\)"):
        Gpu(driver).run(launch(shape=(1 << 20,)), b"image")
    assert driver.blocks == {}


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16, mx.int32, mx.uint32, mx.uint8, mx.bool_])
def test_arrays_go_through_an_executor_unchanged(dtype):
    x = mx.array([[0, 1, 2], [3, 4, 5]]).astype(dtype)
    seen = []

    def copy(launch):
        seen.append(launch)
        return [launch.inputs[0].T.copy()]

    made = factory(copy)("name", ["x"], ["out"], "body", "header", compile_options={"math_mode": "safe"})
    (out,) = made(inputs=[x.T], grid=(130, 2, 1), threadgroup=(64, 1, 1), output_shapes=[(2, 3)], output_dtypes=[dtype])
    assert out.dtype == dtype
    assert mx.array_equal(out, x)
    assert (seen[0].groups, seen[0].threads) == ((3, 2, 1), (64, 1, 1))


def test_values_of_the_executor_decide_whether_a_cell_is_good():
    cell = next(c for c in metal_cells.cells() if str(c) == "linear-affine4g64-float32-tiles")
    with metal_kernel.emulation(factory(Recorder()), M1), use_backend("metal"):
        assert not metal_cells.run(cell).good
