"""Triton kernels. Importing a module of this package imports triton; nothing is compiled before the first launch."""
