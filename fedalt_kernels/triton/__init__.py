"""Triton kernels, each beside its launcher; imported only when one of them is called for."""
