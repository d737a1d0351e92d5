"""Directories that cannot be written, or that others can write: one rule for all caches."""

import os
import stat
import tempfile
from pathlib import Path

import pytest

from aim_jax.utils import cache


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """No temporary directory is remembered, and new ones are made below the test's."""
    for function in (cache._temporary_root, cache._temporary_directory):
        function.cache_clear()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    yield
    for function in (cache._temporary_root, cache._temporary_directory):
        function.cache_clear()


def assert_is_temporary(directory: Path, tmp_path: Path) -> None:
    assert directory.is_relative_to(tmp_path / "tmp")
    for path in (directory, *directory.parents):
        if path == tmp_path / "tmp":
            return
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_the_cache_is_private_and_below_the_home(tmp_path, monkeypatch):
    found = cache.cache_directory("compiled")
    assert found == tmp_path / "home" / ".cache" / "aim_jax" / "compiled"
    for path in (found, found.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_directory() == tmp_path / "xdg" / "aim_jax"


def no_home(monkeypatch, home, tmp_path):
    monkeypatch.setenv("HOME", "/")


def missing_home(monkeypatch, home, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "none"))


def unknown_user(monkeypatch, home, tmp_path):
    def raising():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", raising)


def file_in_the_way(monkeypatch, home, tmp_path):
    (home / ".cache").write_text("")


def foreign(monkeypatch, home, tmp_path):
    monkeypatch.setattr(os, "geteuid", lambda: home.stat().st_uid + 1)


def open_to_the_group(monkeypatch, home, tmp_path):
    (home / ".cache" / "aim_jax").mkdir(parents=True)
    (home / ".cache" / "aim_jax").chmod(0o770)


def open_part(monkeypatch, home, tmp_path):
    (home / ".cache" / "aim_jax" / "native").mkdir(parents=True)
    (home / ".cache" / "aim_jax" / "native").chmod(0o777)


def read_only(monkeypatch, home, tmp_path):
    real = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: "home" not in str(path) and real(path, mode)
    )


@pytest.mark.parametrize(
    "situation, reason",
    [
        (no_home, "the home directory is /"),
        (missing_home, "none does not exist"),
        (unknown_user, "no home directory"),
        (file_in_the_way, "cannot be created"),
        (open_to_the_group, "other users (mode 0770"),
        (open_part, "other users (mode 0777"),
        (read_only, "cannot be written"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_unusable_directories_are_replaced_by_a_private_one(
    situation, reason, monkeypatch, tmp_path, caplog
):
    situation(monkeypatch, tmp_path / "home", tmp_path)
    native = cache.cache_directory("native")
    assert_is_temporary(native, tmp_path)
    if situation is not open_part:
        assert cache.cache_directory("references").parent == native.parent
    assert reason in caplog.text and "XDG_CACHE_HOME" in caplog.text
    assert len(caplog.records) == 1  # one line for all caches
    assert caplog.records[0].getMessage().count("\n") == 0


def test_directories_of_another_user_are_refused(monkeypatch, tmp_path):
    foreign(monkeypatch, tmp_path / "home", tmp_path)
    with pytest.raises(OSError, match="belongs to another user"):
        cache.private_directory(tmp_path / "home")


def test_without_any_directory_the_error_says_what_to_set(monkeypatch, tmp_path):
    no_home(monkeypatch, tmp_path / "home", tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(OSError, match="set TMPDIR"):
        cache.cache_directory()


def test_files_beside_read_only_ones_are_kept_in_the_cache(monkeypatch, tmp_path, caplog):
    file = tmp_path / "data" / "a.tar.index.npz"
    file.parent.mkdir()
    assert cache.writable_or_cached(file) == file
    real = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: "data" not in str(path) and real(path, mode)
    )
    kept = cache.writable_or_cached(file)
    assert kept.parent == tmp_path / "home" / ".cache" / "aim_jax" / "files"
    assert kept == cache.writable_or_cached(file) != cache.writable_or_cached(file.with_name("b"))
    assert "data cannot be written" in caplog.text


def test_other_libraries_get_a_part_of_the_cache_where_theirs_cannot_be_made(tmp_path):
    assert cache.default_or_cached("~/tensorflow_datasets", "datasets") is None
    (tmp_path / "file").write_text("")
    found = cache.default_or_cached(str(tmp_path / "file" / "x"), "datasets")
    assert found == tmp_path / "home" / ".cache" / "aim_jax" / "datasets"


def test_links_and_files_that_others_write_are_not_own(tmp_path):
    file = tmp_path / "a.so"
    assert not cache.is_own_file(file)
    file.write_text("")
    file.chmod(0o600)
    assert cache.is_own_file(file)
    (tmp_path / "b.so").symlink_to(file)
    assert not cache.is_own_file(tmp_path / "b.so")
    file.chmod(0o666)
    assert not cache.is_own_file(file)
