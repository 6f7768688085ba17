"""An NVIDIA GPU through CUDA's driver interface and ctypes. Nothing beyond the driver is needed."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from .kernel import Launch

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


def driver() -> ctypes.CDLL | None:
    """Return the driver's library, or None."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


class Gpu:
    """The first GPU. It keeps the kernels that it has loaded.

    Attributes:
        name: as the driver calls it.
        architecture: as the compiler calls it, such as sm_90.
    """

    def __init__(self, library: Any) -> None:
        self._cuda = library
        self._functions: dict[str, ctypes.c_void_p] = {}
        device, context = ctypes.c_int(), ctypes.c_void_p()
        name, capability = ctypes.create_string_buffer(128), (ctypes.c_int(), ctypes.c_int())
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDeviceGetName", name, len(name), device)
        for value, attribute in zip(capability, (_MAJOR, _MINOR), strict=True):
            self._call("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)
        self.name = name.value.decode()
        self.architecture = f"sm_{capability[0].value}{capability[1].value}"

    def _call(self, function: str, *arguments: Any) -> None:
        if status := getattr(self._cuda, function)(*arguments):
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(status, ctypes.byref(text))
            raise RuntimeError(f"{function}: {(text.value or b'unknown error').decode()} ({status})")

    def _function(self, launch: Launch, image: bytes) -> ctypes.c_void_p:
        if launch.key not in self._functions:
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            self._call("cuModuleLoadData", ctypes.byref(module), image)
            self._call("cuModuleGetFunction", ctypes.byref(function), module, launch.name.encode())
            self._functions[launch.key] = function
        return self._functions[launch.key]

    def run(self, launch: Launch, image: bytes) -> list[np.ndarray]:
        """Run a kernel, given its machine code, and return its outputs. What it does not write is 0xFF: NaN in every floating-point type."""
        function = self._function(launch, image)
        outputs = [np.empty(shape, dtype) for shape, dtype in zip(launch.shapes, launch.dtypes, strict=True)]
        inputs = [np.ascontiguousarray(array) for array in launch.inputs]
        pointers: list[ctypes.c_uint64] = []
        try:
            for array in (*inputs, *outputs):
                pointer = ctypes.c_uint64()
                self._call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(1, array.nbytes)))
                pointers.append(pointer)
            for pointer, array in zip(pointers, inputs, strict=False):
                self._call("cuMemcpyHtoD_v2", pointer, ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes))
            results = list(zip(pointers[len(inputs) :], outputs, strict=True))
            for pointer, array in results:
                self._call("cuMemsetD8_v2", pointer, ctypes.c_ubyte(0xFF), ctypes.c_size_t(array.nbytes))
            parameters = (ctypes.c_void_p * len(pointers))(*(ctypes.addressof(pointer) for pointer in pointers))
            self._call("cuLaunchKernel", function, *launch.groups, *launch.threads, 0, None, parameters, None)
            self._call("cuCtxSynchronize")
            for pointer, array in results:
                self._call("cuMemcpyDtoH_v2", ctypes.c_void_p(array.ctypes.data), pointer, ctypes.c_size_t(array.nbytes))
        finally:
            for pointer in pointers:
                self._cuda.cuMemFree_v2(pointer)
        return outputs
