"""Load tests and benchmarks: `python -m loadtests.bench`. See loadtests/README.md."""
