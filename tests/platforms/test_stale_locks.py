import fcntl
import os
import time
from pathlib import Path

import pytest

from hornbeam.config.environment import read_environment
from hornbeam.core.errors import ConfigError
from hornbeam.platforms.stale_locks import sweep_stale_locks

pytestmark = pytest.mark.pure


def make(path: Path, age: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_old_locks_that_nobody_holds_go(tmp_path):
    old = make(tmp_path / "a/module.lock", 120)
    bare = make(tmp_path / "b/lock", 120)
    new = make(tmp_path / "module.lock", 20)
    held = make(tmp_path / "held.lock", 120)
    other = make(tmp_path / "module.so", 120)
    with held.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        sweep_stale_locks([tmp_path, tmp_path / "absent"], 60)
        assert [path.exists() for path in (old, bare, new, held, other)] == [False, False, True, True, True]
    sweep_stale_locks([tmp_path], 60)
    assert not held.exists()


def test_settings():
    environment = read_environment({"HORNBEAM_STALE_LOCK_AGE_MINUTES": "2", "FLASHINFER_WORKSPACE_BASE": "/x"})
    assert environment.stale_lock_seconds == 120
    assert Path("/x/.cache/flashinfer") in environment.build_caches
    assert read_environment({}).stale_lock_seconds == 1800
    with pytest.raises(ConfigError, match="HORNBEAM_STALE_LOCK_AGE_MINUTES"):
        read_environment({"HORNBEAM_STALE_LOCK_AGE_MINUTES": "soon"})
