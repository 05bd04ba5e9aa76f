"""The kernels of the fused path in Triton and their host side."""
