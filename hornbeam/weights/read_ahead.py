"""Brings files into the page cache shortly before they are read through a mapping, which alone would wait page by page.

Knows nothing of what is in the files. On systems other than Linux nothing is done.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

_NUM_READERS = 4
_CHUNK_BYTES = 16 << 20
_PIECE_BYTES = 1 << 20  # what is read is thrown away: fresh memory for it would cost more than the reading
_PAGE_BYTES = 4096
_FILES_AHEAD = 1  # behind the one in use; more could push each other out of the cache


@contextmanager
def read_ahead(paths: Sequence[Path]) -> Iterator[Callable[[], None]]:
    """Read `paths` in order in the background; call the result when work on the next file begins.

    What cannot be read is left for the reader proper to complain about.
    """
    turns = threading.Semaphore(_FILES_AHEAD)
    over = threading.Event()

    def read(path: Path, start: int) -> None:
        if not over.is_set():
            _read(path, start)

    def run() -> None:
        with ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="read-ahead") as pool:
            for path in paths:
                turns.acquire()
                for chunk in [pool.submit(read, path, start) for start in _starts(path)]:
                    chunk.result()

    reader = threading.Thread(target=run, name="read-ahead", daemon=True)
    if sys.platform == "linux":
        reader.start()
    try:
        yield turns.release
    finally:
        over.set()
        turns.release(max(len(paths), 1))
        if reader.ident is not None:
            reader.join()


def read_early(path: Path) -> None:
    """Begin to read `path` in the background, for a reader that will come; it need not wait for the end."""
    starts = _starts(path) if sys.platform == "linux" else range(0)

    def run(own_starts: range) -> None:
        for start in own_starts:
            _read(path, start)

    for first in range(min(_NUM_READERS, len(starts))):
        threading.Thread(target=run, args=(starts[first::_NUM_READERS],), name="read-early", daemon=True).start()


def _starts(path: Path) -> range:
    try:
        return range(0, path.stat().st_size, _CHUNK_BYTES)
    except OSError:
        return range(0)


def _read(path: Path, start: int) -> None:
    try:
        with path.open("rb", buffering=0) as file:
            if not _is_cached(file.fileno(), start):
                piece = bytearray(_PIECE_BYTES)
                for position in range(start, start + _CHUNK_BYTES, _PIECE_BYTES):
                    os.preadv(file.fileno(), [piece], position)
    except OSError:
        return


def _is_cached(descriptor: int, start: int) -> bool:
    """Whether the chunk's end is there already (its start may be, because the reader proper has come so far)."""
    last = min(start + _CHUNK_BYTES, os.fstat(descriptor).st_size) - 1
    try:
        return os.preadv(descriptor, [bytearray(_PAGE_BYTES)], last, os.RWF_NOWAIT) > 0
    except BlockingIOError:
        return False
