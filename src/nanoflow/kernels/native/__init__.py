"""CPU kernels in C++, compiled for this very processor at first use and called through ctypes."""
