"""Shapes and values on which kernels are tested and measured, the same for both."""
