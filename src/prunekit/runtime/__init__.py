"""Pruned weights that stay packed in memory: kernels that expand them in registers, and the linear modules that call these."""
