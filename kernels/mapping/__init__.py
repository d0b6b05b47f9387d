"""Triton kernels of the mapping family: label maps on a model's outputs, and the counts they are made from."""
