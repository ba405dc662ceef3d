"""Compiles the C++ of this folder into one shared library and keeps it in a cache on disk.

Owns the compiler's command line and the name of the cached file. Does not load what it builds. The
library has a plain C interface and includes no torch headers, so building takes seconds.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SOURCE_DIR = Path(__file__).parent
# The last: the compiler fuses no product and sum of its own accord; see `fused` in lanes.h.
OPTIONS = (
    *("-O3", "-std=c++17", "-fopenmp", "-fPIC", "-fvisibility=hidden", "-w"),
    "-ffp-contract=off",
)
COMPILE_TIMEOUT_S = 300


class BuildError(Exception):
    """The library cannot be built here; the text says why and what would help."""


@dataclass(frozen=True)
class Built:
    path: Path
    compiled: bool  # False: it was in the cache
    command: str


def cache_dir() -> Path:
    """Where compiled libraries live: OCTAVO_CACHE_DIR, else the user's XDG cache folder."""
    chosen = os.environ.get("OCTAVO_CACHE_DIR")
    if chosen:
        return Path(chosen) / "native"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "octavo" / "native"


def build(march: str = "native") -> Built:
    """The library for the instruction set `march` (as in the compiler's -march), built if new.

    Raises BuildError. Processes that build at once each write a file of their own and rename it
    into place, so none can see half a library.
    """
    compiler = _compiler()
    options = (*OPTIONS, f"-march={march}")
    path = cache_dir() / f"kernels-{_key(compiler, options)}.so"
    command = [*compiler, *options]
    if not path.exists():
        _compile(command, path)
        return Built(path, True, shlex.join(command))
    return Built(path, False, shlex.join(command))


def _sources(suffix: str) -> list[Path]:
    return sorted(SOURCE_DIR.glob(f"*{suffix}"))


def _compiler() -> list[str]:
    """The C++ compiler: $CXX if set, else the first of g++ and c++ on the path."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    for candidate in [chosen] if chosen else [["g++"], ["c++"]]:
        if shutil.which(candidate[0]):
            return candidate
    looked_for = chosen[0] if chosen else "g++ or c++"
    raise BuildError(
        f"no C++ compiler ({looked_for}) on the PATH; install one (for example the package g++)"
    )


def _key(compiler: list[str], options: tuple[str, ...]) -> str:
    """Names everything the compiled code depends on; -march=native makes the CPU part of it."""
    digest = hashlib.sha256()
    for source in (*_sources(".h"), *_sources(".cpp")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    version = _run([*compiler, "--version"]).stdout
    for part in (*compiler, version, *options, platform.machine(), _cpu_flags()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:24]


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as failure:
        raise BuildError(f"{command[0]} could not be run: {failure}") from failure
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        errors = [line for line in lines if "error" in line] or lines
        raise BuildError(
            f"{command[0]} failed: {errors[0]}; run `python -m octavo.kernels.native` to see it "
            "again, and set CXX to choose another compiler"
        )
    return done


def _compile(command: list[str], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        workspace = tempfile.TemporaryDirectory(dir=path.parent, prefix="building-")
    except OSError as failure:
        raise BuildError(
            f"the cache folder {path.parent} cannot be written ({failure}); set OCTAVO_CACHE_DIR"
        ) from failure
    with workspace as folder:
        sources = _sources(".cpp")
        objects = [str(Path(folder) / f"{source.stem}.o") for source in sources]
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # the compilers are processes of their own
            jobs = zip(sources, objects, strict=True)
            list(pool.map(lambda job: _run([*command, "-c", str(job[0]), "-o", job[1]]), jobs))
        fresh = Path(folder) / path.name
        _run([*command, "-shared", *objects, "-o", str(fresh)])
        os.replace(fresh, path)
