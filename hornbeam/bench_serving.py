"""`python -m hornbeam.bench_serving` equals `hornbeam bench serving`."""

from hornbeam.serve.cli import run_module

if __name__ == "__main__":
    run_module("bench serving")
