"""Log lines of both processes, alike, to stderr."""

import logging


def set_up_logging(level: str, process: str) -> None:
    """Log what is at least as severe as `level` ("debug", ...), each line with the name of this process."""
    logging.basicConfig(
        level=level.upper(), format=f"%(asctime)s {process} %(levelname)s %(message)s", datefmt="%H:%M:%S", force=True
    )
