"""Triton kernels for packed models. Each has a torch reference of the same name with `_reference` after it."""
