"""Side-by-side benchmarks: `python -m benchmarks`, and on a GPU machine `python -m benchmarks.gpu`."""
