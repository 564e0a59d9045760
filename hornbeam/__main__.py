"""`python -m hornbeam` equals `hornbeam`."""

import sys

from hornbeam.serve.cli import main

if __name__ == "__main__":
    sys.exit(main())
