"""`python -m hornbeam.bench_one_batch_server` equals `hornbeam bench one-batch-server`."""

from hornbeam.serve.cli import run_module

if __name__ == "__main__":
    run_module("bench one-batch-server")
