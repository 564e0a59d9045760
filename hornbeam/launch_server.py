"""`python -m hornbeam.launch_server` equals `hornbeam serve`."""

import sys

from hornbeam.serve.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
