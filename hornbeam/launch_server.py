"""`python -m hornbeam.launch_server` equals `hornbeam serve`."""

from hornbeam.serve.cli import run_module

if __name__ == "__main__":
    run_module("serve")
