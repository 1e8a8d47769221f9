"""Speed, size and memory, against the tools people use now; `python -m benchmarks` runs all of it."""
