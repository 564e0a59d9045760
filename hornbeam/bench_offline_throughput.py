"""`python -m hornbeam.bench_offline_throughput` equals `hornbeam bench offline`."""

from hornbeam.serve.cli import run_module

if __name__ == "__main__":
    run_module("bench offline")
