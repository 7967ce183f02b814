"""The workshop: comparisons, reports, benchmarks and the embedded data set. Nothing that a training run needs."""
