"""The fused kernels against their peers."""
