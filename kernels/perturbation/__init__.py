"""Triton kernels of the perturbation family: a prompt on the raw input, in one pass over memory."""
