"""Triton kernels that read the int4 tiles. Each module imports without Triton; its calls do not."""
