"""Kernels of our own for CPUs, written in C: built at the first start on a machine, kept on disk, loaded with ctypes.

The sources stand beside this file. They need AVX-512 with VNNI and a C compiler; where either is missing, backends
that use them say so in `supports`, and others serve.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch

from hornbeam.config.environment import read_environment
from hornbeam.ops.device import needs_cpu
from hornbeam.ops.query import OpQuery

_SOURCES = ("team.c", "products.c", "attention.c")
_HEADERS = ("team.h", "vectors.h")
_FLAGS = ("-O3", "-march=native", "-shared", "-fPIC", "-pthread")
_COMPILERS = ("cc", "gcc", "clang")
_NEEDED = frozenset(("avx512f", "avx512bw", "avx512dq", "avx512_vnni"))  # as Linux names them
_COMPILE_SECONDS = 120

# Arguments of each function, and what it returns; see the sources.
_FUNCTIONS = {
    "team_start": ((c_int,), c_int),
    "hornbeam_product": ((*(c_void_p,) * 4, c_float, *(c_void_p,) * 3, c_int, c_int), None),
    "hornbeam_fits": ((c_void_p, c_void_p), c_int),
    "hornbeam_pack": ((c_void_p, c_void_p), None),
    "hornbeam_packed_bytes": ((c_void_p,), c_int64),
    "hornbeam_store": ((c_void_p,), None),
    "hornbeam_attend": ((c_void_p, c_void_p, c_int64, *(c_void_p,) * 4), None),
}


def needs_library(query: OpQuery) -> str | None:
    """None where the kernels can run in float32, else the reason for `supports`."""
    if reason := needs_cpu(query):
        return reason
    if query.dtype != "float32":
        return "needs float32"
    return _missing()


@cache
def _missing() -> str | None:
    """Why there are no kernels, asked once: failing takes time, too."""
    try:
        load_library()
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return str(error)
    return None


@cache
def load_library() -> ctypes.CDLL:
    """The kernels, with as many threads as torch has.

    Raises:
        RuntimeError: the processor cannot run them, or they cannot be compiled.
        OSError, SubprocessError: they cannot be kept on disk, or not be loaded; compiling takes too long.
    """
    library = ctypes.CDLL(str(_built(read_environment().cache_dir / "native")))
    for name, (arguments, result) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    library.team_start(torch.get_num_threads() - 1)
    return library


def _built(folder: Path) -> Path:
    """The path of the compiled library in `folder`; compiled now if it is not there yet."""
    processor = _processor()
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise RuntimeError(f"needs a C compiler ({', '.join(_COMPILERS)})")
    here = Path(__file__).parent
    stamp = Path(compiler).resolve().stat()
    parts = [(here / name).read_bytes() for name in (*_SOURCES, *_HEADERS)]
    parts += [" ".join((*_FLAGS, compiler, str(stamp.st_mtime_ns), str(stamp.st_size))).encode(), processor.encode()]
    path = folder / f"{hashlib.sha256(b''.join(parts)).hexdigest()[:32]}.so"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    owner = folder.stat()
    if owner.st_uid != os.getuid() or owner.st_mode & 0o022:
        raise RuntimeError(f"{folder} must belong to the user alone, as code is loaded from there")
    if not path.exists():
        _compile(compiler, [str(here / name) for name in _SOURCES], path)
    return path


def _compile(compiler: str, sources: list[str], path: Path) -> None:
    """Others may compile the same at the same time: who is last replaces what is equal."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [compiler, *_FLAGS, "-o", str(made), *sources, "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=False)
        if done.returncode:
            lines = done.stderr.splitlines() or [f"exit status {done.returncode}"]
            raise RuntimeError("the C compiler failed: " + next((line for line in lines if "error" in line), lines[0]))
        made.replace(path)


def _processor() -> str:
    """What code compiled for this processor depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text("utf-8").splitlines() if cpuinfo.exists() else []
    flags = next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")
    if missing := _NEEDED.difference(flags.split()):
        raise RuntimeError(f"needs an x86 processor with AVX-512 and VNNI; {', '.join(sorted(missing))} is missing")
    model = next((line for line in lines if line.startswith("model name")), "")
    return model + flags
