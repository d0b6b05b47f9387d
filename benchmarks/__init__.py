"""Side-by-side benchmarks: `fastprompt bench`, in the source tree also `python -m benchmarks` and `python -m benchmarks.gpu`."""
