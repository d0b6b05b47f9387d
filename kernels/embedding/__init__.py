"""Triton kernels of the embedding family: rows of the vocabulary and soft rows by one gather, and the soft rows' gradient."""
