"""NVIDIA's driver by its own C interface, through ctypes: memory, copies and a stream need no CUDA toolkit.

Names and numbers are those of cuda.h, CUDA 12 and 13.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

from numpy.typing import NDArray

from ..errors import BadInput, FewstepError

__all__ = ["Device", "Memory", "open_device"]

Array = NDArray[Any]

OUT_OF_MEMORY, NO_DEVICE, DRIVER_MISMATCH, NOT_SUPPORTED = 2, 100, 803, 804
"""Of CUresult."""
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76
"""Of CUdevice_attribute."""

GIVES_BACK = "close other programs that use it, draw with low_memory=True, or take a smaller bundle"


class Device:
    """The first NVIDIA GPU, with a stream of its own."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self.name, self.capability, self.driver_version = "", "", 0
        number, device = ctypes.c_int(), ctypes.c_int()
        self._call("cuDriverGetVersion", ctypes.byref(number))
        self.driver_version = number.value
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        label = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", label, len(label), device)
        self.name = label.value.decode(errors="replace")
        numbers = []
        for attribute in (CAPABILITY_MAJOR, CAPABILITY_MINOR):
            self._call("cuDeviceGetAttribute", ctypes.byref(number), attribute, device)
            numbers.append(str(number.value))
        self.capability = ".".join(numbers)
        self._device = device
        # the primary context is the one that TensorRT's own CUDA runtime uses
        context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._context: ctypes.c_void_p | None = context
        self.enter()
        self._stream = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(self._stream), 1)  # 1: it waits for no other stream

    @property
    def stream(self) -> int:
        return self._stream.value or 0

    def enter(self) -> None:
        """Make the calling thread work on this device."""
        self._call("cuCtxSetCurrent", self._context)

    def memory(self, size: int) -> Memory:
        """Raises FewstepError where the device has no such room."""
        pointer = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(size, 1)), size=size)
        return Memory(self, pointer.value, size)

    def copy_in(self, memory: Memory, array: Array) -> None:
        """Behind what the stream holds; `array` is C-contiguous and stays until `wait`."""
        assert array.flags.c_contiguous
        assert array.nbytes <= memory.size
        self._call(
            "cuMemcpyHtoDAsync_v2",
            ctypes.c_uint64(memory.address),
            ctypes.c_void_p(array.ctypes.data),
            ctypes.c_size_t(array.nbytes),
            self._stream,
        )

    def copy_out(self, array: Array, memory: Memory) -> None:
        assert array.flags.c_contiguous
        assert array.nbytes <= memory.size
        self._call(
            "cuMemcpyDtoHAsync_v2",
            ctypes.c_void_p(array.ctypes.data),
            ctypes.c_uint64(memory.address),
            ctypes.c_size_t(array.nbytes),
            self._stream,
        )

    def wait(self) -> None:
        """Until the stream is through. Raises FewstepError for what went wrong on the device meanwhile."""
        self._call("cuStreamSynchronize", self._stream)

    def free(self, address: int) -> None:
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def room(self) -> tuple[int, int]:
        """Free and all bytes of the device's memory."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def close(self) -> None:
        if self._context is not None:
            self._context = None
            self._call("cuStreamDestroy_v2", self._stream)
            self._call("cuDevicePrimaryCtxRelease_v2", self._device)

    def _call(self, name: str, *args: Any, size: int = 0) -> None:
        code = int(getattr(self._driver, name)(*args))
        if code == 0:
            return
        if code == OUT_OF_MEMORY:
            wanted = f" of another {size / 2**20:,.0f} MiB" if size else ""
            raise FewstepError(f"{self.name or 'the GPU'} has no room{wanted}", fix=GIVES_BACK)
        raise FewstepError(
            f"{self.name or 'the GPU'}: {name} failed ({_reason(self._driver, code)})",
            fix="run it again; nvidia-smi says whether the GPU still answers",
        )


class Memory:
    """A piece of the device's memory."""

    def __init__(self, device: Device, address: int, size: int) -> None:
        self._device, self.address, self.size = device, address, size

    def free(self) -> None:
        if self.address:
            address, self.address = self.address, 0
            self._device.free(address)


def open_device(driver: Any = None) -> Device:
    """The first GPU. Raises BadInput where there is no driver or no GPU, or the two do not fit each other.

    driver  the library, for tests; None: the one the system has
    """
    if driver is None:
        name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
        try:
            driver = ctypes.CDLL(name)
        except OSError:
            raise BadInput(
                f"this host has no NVIDIA driver ({name})",
                expected="an NVIDIA GPU and its driver",
                fix="install the driver, or export for another target (fewstep targets)",
            ) from None
    code = int(driver.cuInit(0))
    if code == NO_DEVICE:
        raise BadInput(
            "the NVIDIA driver finds no GPU",
            expected="an NVIDIA GPU",
            fix="check nvidia-smi and CUDA_VISIBLE_DEVICES, or export for another target (fewstep targets)",
        )
    if code in (DRIVER_MISMATCH, NOT_SUPPORTED):
        raise BadInput(
            f"the NVIDIA driver's parts do not fit each other ({_reason(driver, code)})",
            fix="restart the machine after a driver update, or install the driver again",
        )
    if code:
        raise BadInput(f"the NVIDIA driver does not start ({_reason(driver, code)})", fix="check nvidia-smi")
    return Device(driver)


def _reason(driver: Any, code: int) -> str:
    text = ctypes.c_char_p()
    known = driver.cuGetErrorName(code, ctypes.byref(text)) == 0 and text.value
    return known.decode() if known else f"CUDA error {code}"
