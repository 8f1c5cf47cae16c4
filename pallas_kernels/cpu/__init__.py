"""Kernels in C++ for x86-64, behind XLA's foreign function interface.

A sum's order is written in the sources and does not know the number of rows, of threads, or the processor: AVX2,
AVX-512 and AMX give the same bits (product.h, attend.h and draw.h say in which order they add).
"""
