"""Locks of builds that were killed, which the next start would wait for.

Libraries that compile kernels when they are first needed lock what they build. Most locks go with their process; on
file systems that cannot lock, and with torch's extensions, a file that is there is a lock, and stays. Triton needs
none: what it has compiled appears under its name in one step.
"""

import fcntl
import logging
import time
from collections.abc import Iterable
from pathlib import Path

logger = logging.getLogger(__name__)


def sweep_stale_locks(folders: Iterable[Path], max_age: float) -> None:
    """Remove the locks below `folders` that are older than `max_age` seconds, unless a process holds them."""
    for path in (path for folder in folders if folder.is_dir() for path in folder.rglob("*lock")):
        try:
            if path.is_file() and time.time() - path.stat().st_mtime > max_age and not _is_held(path):
                path.unlink()
                logger.warning("removed %s, the lock of a build that must have been killed", path)
        except OSError:  # another process was faster, or it is not ours
            continue


def _is_held(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # no such locks here: only its age can tell
            return False
    return False
