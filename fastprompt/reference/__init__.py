"""The same mathematics in plain PyTorch: the documentation in code, the oracle of the tests, the path without Triton."""
