"""Triton kernels of the attention family: a prefix that the batch shares beside each sample's own keys, in one softmax."""
