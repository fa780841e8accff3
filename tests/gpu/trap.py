"""Breaks the device for the process that calls it, as a kernel with an illegal access does: for good."""

from __future__ import annotations

import ctypes

PTX = b"""
.version 7.0
.target sm_75
.address_size 64
.visible .entry broken() { trap; }
"""


def trap(stream: int) -> None:
    """Put a kernel on the stream that ends in an error. Within `Cuda.active`."""
    driver = ctypes.CDLL("libcuda.so.1")
    module, kernel = ctypes.c_void_p(), ctypes.c_void_p()
    assert driver.cuModuleLoadData(ctypes.byref(module), PTX) == 0
    assert driver.cuModuleGetFunction(ctypes.byref(kernel), module, b"broken") == 0
    one = [ctypes.c_uint(1)] * 6
    shared, on = ctypes.c_uint(0), ctypes.c_void_p(stream)
    assert driver.cuLaunchKernel(kernel, *one, shared, on, None, None) == 0
