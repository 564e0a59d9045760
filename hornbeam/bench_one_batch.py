"""`python -m hornbeam.bench_one_batch` equals `hornbeam bench one-batch`."""

from hornbeam.serve.cli import run_module

if __name__ == "__main__":
    run_module("bench one-batch")
