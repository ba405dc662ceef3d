"""Building the CPU kernels: the cache, its key, and what happens without a compiler."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from octavo.kernels import LINEAR, RMS_NORM, Case, native
from octavo.kernels.native import compiler
from octavo.kernels.native.compiler import BuildError, build, cache_dir


@pytest.fixture
def nothing_loaded(monkeypatch):
    monkeypatch.setattr(native, "_library", None)
    monkeypatch.setattr(native, "_failure", None)


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("OCTAVO_CACHE_DIR", str(tmp_path))
    return tmp_path


def fake_compiler(folder: Path, script: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


WORKING = """if [ "$1" = --version ]; then echo one; exit 0; fi
while [ "$1" != -o ]; do shift; done; echo library > "$2" """


def test_a_second_build_finds_the_first(monkeypatch, empty_cache, tmp_path):
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, WORKING))
    first, second = build(), build()
    assert (first.compiled, second.compiled) == (True, False)
    assert first.path == second.path
    assert first.path.read_text() == "library\n"
    assert [entry.name for entry in cache_dir().iterdir()] == [first.path.name]  # no litter


def test_what_the_code_depends_on_names_the_file(monkeypatch, empty_cache, tmp_path):
    script = fake_compiler(tmp_path, WORKING)
    monkeypatch.setenv("CXX", script)
    paths = {build().path, build("x86-64-v3").path}
    Path(script).write_text(Path(script).read_text().replace("echo one", "echo two"))
    paths.add(build().path)
    monkeypatch.setattr(compiler, "_cpu_flags", lambda: "flags: another machine")
    paths.add(build().path)
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "a.cpp").write_text("int changed;")
    monkeypatch.setattr(compiler, "SOURCE_DIR", sources)
    paths.add(build().path)
    assert len(paths) == 5


def test_the_cache_is_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setenv("OCTAVO_CACHE_DIR", str(tmp_path / "ours"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "ours" / "native"
    monkeypatch.delenv("OCTAVO_CACHE_DIR")
    assert cache_dir() == tmp_path / "xdg" / "octavo" / "native"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "octavo" / "native"


def test_without_a_compiler_one_warning_and_the_reference(monkeypatch, empty_cache, nothing_loaded):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(native.NativeKernelWarning, match="no-such-compiler.*install") as warned:
        choices = [op.select(Case("cpu", torch.bfloat16)) for op in (RMS_NORM, LINEAR)]
    assert len(warned) == 1
    assert [choice.name for choice in choices] == ["reference", "reference"]
    assert all("no C++ compiler" in str(choice) for choice in choices)
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler"):
        native.library()


def test_a_failed_compile_names_the_error(monkeypatch, empty_cache, tmp_path):
    script = (
        'if [ "$1" = --version ]; then exit 0; fi; echo note >&2; echo "x: error: bad" >&2; exit 1'
    )
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, script))
    with pytest.raises(BuildError, match="error: bad.*CXX"):
        build()
    assert list(cache_dir().iterdir()) == []


def test_a_library_that_cannot_be_loaded_is_no_crash(
    monkeypatch, empty_cache, nothing_loaded, tmp_path
):
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, WORKING))
    with pytest.warns(native.NativeKernelWarning, match="not available"):
        assert native.unavailable() is not None


def test_a_cache_that_cannot_be_written_names_the_remedy(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OCTAVO_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, WORKING))
    with pytest.raises(BuildError, match="OCTAVO_CACHE_DIR"):
        build()


def test_the_command_builds_ahead_and_says_what_it_did():
    if (reason := native.unavailable()) is not None:
        pytest.skip(reason)
    command = [sys.executable, "-m", "octavo.kernels.native"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "already built" in done.stdout
    assert f"features: {' '.join(native.features())}" in done.stdout


def test_the_command_fails_when_the_build_does(monkeypatch, empty_cache):
    monkeypatch.setenv("CXX", "no-such-compiler")
    command = [sys.executable, "-m", "octavo.kernels.native"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no C++ compiler" in done.stderr


def test_features_tell_the_builds_apart(isa):
    features = native.features()
    if isa == "x86-64":
        assert features == ("baseline",)
    elif isa == "x86-64-v3":
        assert features == ("avx2",)
    else:
        assert features
