"""The cache of compiled programs: private, bounded, without effect on results, never an error."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from configs import default
from modelstock_jax.errors import UserError
from modelstock_jax.experiment.setup import check_and_set_up
from modelstock_jax.fileio import FileLock
from modelstock_jax.training import compilation_cache
from modelstock_jax.training.compilation_cache import default_directory, use_compilation_cache
from tests.experiment import small_run

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
)


def settings():
    return [getattr(jax.config, name) for name in SETTINGS]


@pytest.fixture
def user_cache(tmp_path, monkeypatch):
    """Replace the user's cache directory, and unset JAX's settings."""
    before = settings()
    for name in SETTINGS:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    values = (None, True, -1, 1.0)
    for name, value in zip(SETTINGS, values, strict=True):
        jax.config.update(name, value)
    compilation_cache._warn.cache_clear()
    yield tmp_path / "user" / "modelstock_jax"
    for name, value in zip(SETTINGS, before, strict=True):
        jax.config.update(name, value)
    compilation_cache.compilation_cache.reset_cache()


def compile_anew(factor=3):
    """Compile a program that is not in JAX's memory, and check its result."""
    jax.clear_caches()
    assert jax.jit(lambda x: jnp.sin(x) * factor)(jnp.zeros(3)).tolist() == [0, 0, 0]


def programs(directory):
    return sorted(path for path in directory.iterdir() if path.name.endswith("-cache"))


def mode(path):
    return path.stat().st_mode & 0o777


def test_default_directory_is_private_and_bounded(user_cache, capsys):
    old = os.umask(0)
    try:
        check_and_set_up(default.get_config())
    finally:
        os.umask(old)
    path = default_directory()
    assert path.parent == user_cache / "compiled"
    assert [mode(p) for p in (user_cache.parent, user_cache, path.parent, path)] == [0o700] * 4
    assert settings() == [str(path), True, 2**30, 0.1]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compile_anew()
    assert programs(path) and capsys.readouterr().err == ""
    use_compilation_cache("auto")  # JAX's setting now has a directory.
    assert settings() == [str(path), True, 2**30, 0.0]


def test_processors_do_not_share_a_directory(monkeypatch):
    text = "processor : 0\nmodel name : A\nflags : sse2 {}\ncpu MHz : {}\n\nprocessor : 1\n"
    names = []
    for flags, mhz in (("", 1), ("", 2), ("avx2", 1)):
        monkeypatch.setattr(Path, "read_text", lambda _, f=flags, m=mhz: text.format(f, m))
        names.append(default_directory().name)
    assert names[0] == names[1] != names[2]


@pytest.mark.parametrize("name", SETTINGS[2:])
def test_settings_in_the_environment_are_kept(user_cache, monkeypatch, name):
    monkeypatch.setenv(name.upper(), "7")
    jax.config.update(name, 7)
    path = default_directory()
    path.mkdir(parents=True)
    (path / "jit_f-0-cache").write_bytes(b"without a limit, JAX writes no access times")
    use_compilation_cache("auto")
    assert getattr(jax.config, name) == 7
    assert jax.config.jax_compilation_cache_dir == str(path)
    assert bool(programs(path)) == (name == "jax_compilation_cache_max_size")


def test_directory_of_jax_is_kept(user_cache, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "jax"))
    use_compilation_cache("auto")
    assert settings() == [str(tmp_path / "jax"), True, -1, 1.0] and not user_cache.exists()


def test_no_directory_if_jax_disables_its_cache_or_for_the_empty_option(user_cache):
    use_compilation_cache("")
    jax.config.update("jax_enable_compilation_cache", False)
    use_compilation_cache("auto")
    assert settings() == [None, False, -1, 1.0] and not user_cache.exists()


def test_no_default_directory_for_several_processes(user_cache, monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    use_compilation_cache("auto")
    assert settings() == [None, True, -1, 1.0] and not user_cache.exists()


def test_off_disables_the_directory_of_jax(user_cache, tmp_path):
    (tmp_path / "jax").mkdir()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compile_anew()
    before = len(programs(tmp_path / "jax"))
    use_compilation_cache("off")
    compile_anew(5)
    assert before and len(programs(tmp_path / "jax")) == before


def test_directory_of_the_option(user_cache, tmp_path):
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    use_compilation_cache(str(tmp_path / "cache"))
    compile_anew()
    assert programs(tmp_path / "cache")
    assert settings() == [str(tmp_path / "cache"), True, -1, 0.0] and not user_cache.exists()
    use_compilation_cache(str(tmp_path / "other"))
    compile_anew()
    assert programs(tmp_path / "other")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="compute.compilation_cache"):
        use_compilation_cache(str(tmp_path / "file"))


def warning(capsys):
    """Return the one line that says why the default directory is not used."""
    use_compilation_cache("auto")
    use_compilation_cache("auto")
    assert settings() == [None, True, -1, 1.0]
    compile_anew()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: compiled programs are not cached: ")
    assert "--config.compute.compilation_cache=DIR (off hides this warning)" in line
    return line


@pytest.mark.parametrize("bits", [0o020, 0o002])
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_directory_that_others_can_write(user_cache, capsys, bits, depth):
    path = default_directory()
    path.mkdir(parents=True)
    place = (path, *path.parents)[depth]
    place.chmod(0o755 | bits)
    fix = "chmod go-w" if depth else "rm -r"
    assert f"other users can write to {place}; run `{fix} {place}`" in warning(capsys)


def test_sticky_directory_above_is_safe(user_cache):
    path = default_directory()
    path.mkdir(parents=True)
    user_cache.chmod(0o1777)
    compilation_cache.check_private(path)
    path.chmod(0o1777)
    with pytest.raises(UserError, match="other users can write"):
        compilation_cache.check_private(path)


def test_link_to_a_directory_that_others_can_write(user_cache, tmp_path, capsys):
    (tmp_path / "public").mkdir()
    (tmp_path / "public").chmod(0o777)
    path = default_directory()
    path.parent.mkdir(parents=True)
    path.symlink_to(tmp_path / "public")
    assert f"other users can write to {tmp_path / 'public'}; " in warning(capsys)


def test_directory_of_another_user(user_cache, capsys, monkeypatch):
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    assert "belongs to another user; set XDG_CACHE_HOME; or" in warning(capsys)
    assert not any(default_directory().iterdir())


def test_directory_of_root_is_not_ones_own(user_cache, monkeypatch):
    """Root may own the directories above, but not the one that JAX executes files of."""
    path = default_directory()
    path.mkdir(parents=True)
    stat = Path.stat

    def of(uid, places):
        def changed(self, **kwargs):
            info = list(stat(self, **kwargs))
            info[4] = uid if self in places else os.geteuid()
            return os.stat_result(info)

        return changed

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(Path, "stat", of(0, path.parents))
    compilation_cache.check_private(path)
    monkeypatch.setattr(Path, "stat", of(0, [path]))
    with pytest.raises(UserError, match=f"{path} belongs to another user"):
        compilation_cache.check_private(path)
    monkeypatch.setattr(Path, "stat", of(1001, [user_cache]))
    with pytest.raises(UserError, match=f"{user_cache} belongs to another user"):
        compilation_cache.check_private(path)


def raises(error):
    def function(*args, **kwargs):
        raise error

    return function


@pytest.mark.parametrize(
    ("target", "name", "replacement", "message"),
    [
        (os, "fsync", raises(OSError(errno.EDQUOT, "Disk quota exceeded")), "quota exceeded"),
        (os, "mkdir", raises(OSError(errno.EROFS, "Read-only file system")), "Read-only"),
        (Path, "home", raises(RuntimeError("Could not determine home directory")), "home"),
        (fcntl, "flock", raises(OSError(errno.ENOLCK, "No locks available")), "No locks"),
        (shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2, 1, 1), "1.1 GB are free"),
    ],
    ids=["quota", "read-only", "no home", "no locks", "full"],
)
def test_cache_that_cannot_be_written(
    user_cache, capsys, monkeypatch, target, name, replacement, message
):
    if name == "home":
        monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(target, name, replacement)
    assert message in warning(capsys)


def test_cache_directory_is_a_file(user_cache, capsys):
    user_cache.parent.mkdir()
    user_cache.write_text("")
    assert "File exists" in warning(capsys)


def test_incomplete_program_of_a_killed_process_is_replaced(user_cache):
    use_compilation_cache("auto")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compile_anew()
    path = default_directory()
    before = programs(path)
    for program in before:
        program.write_bytes(program.read_bytes()[:50])
        program.with_name(program.name.replace("-cache", "-atime")).unlink()
    jax.config.update("jax_compilation_cache_dir", None)
    with FileLock(path / ".lockfile"):  # The process that writes may still run.
        use_compilation_cache("auto")
        assert programs(path) == before
    jax.config.update("jax_compilation_cache_dir", None)
    use_compilation_cache("auto")
    assert programs(path) == []
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compile_anew()
    assert min(program.stat().st_size for program in programs(path)) > 500
    jax.config.update("jax_compilation_cache_dir", None)
    use_compilation_cache("auto")
    assert programs(path) == before


def test_damaged_program_is_compiled_again(user_cache):
    use_compilation_cache("auto")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compile_anew()
    for program in programs(default_directory()):
        program.write_bytes(program.read_bytes()[:-20])
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache"):
        compile_anew()


# Quicker tests that resume runs do so with cached programs too.
@pytest.mark.slow
def test_run_with_cached_programs_has_the_same_bits(tmp_path):
    """Two processes: one with an empty cache, one with its programs, one of them damaged."""
    anchor = small_run.save_anchor(tmp_path / "clip")
    environment = {
        "XDG_CACHE_HOME": str(tmp_path / "user"),
        "JAX_COMPILATION_CACHE_DIR": "",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def run(name):
        arguments = small_run.arguments(anchor, tmp_path / name, *small_run.SHORT)
        code, output = small_run.finish(*arguments, environment=environment)
        assert code == 0, output
        results = {
            path.relative_to(tmp_path / name): path.read_bytes()
            for pattern in ("model/*.safetensors", "results.json")
            for path in (tmp_path / name).glob(pattern)
        }
        (directory,) = (tmp_path / "user/modelstock_jax/compiled").iterdir()
        times = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
        return output, results, times, directory

    _, cold, first, directory = run("cold")
    (damaged,) = directory.glob("jit_merge_step-*-cache")
    damaged.write_bytes(damaged.read_bytes()[:100])
    output, warm, second, _ = run("warm")
    assert len(warm) == 3 and warm == cold
    (line,) = (line for line in output.splitlines() if "Warning:" in line)
    assert "Error reading persistent compilation cache entry for 'jit_merge_step'" in line
    assert second.keys() == first.keys()
    read = [name for name in first if name.endswith("-atime") and second[name] > first[name]]
    assert len(read) >= len(programs(directory)) - 1 > 20
