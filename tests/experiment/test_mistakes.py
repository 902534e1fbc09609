"""A user's mistakes at the command line: one line, a non-zero exit, no traceback, nothing lost."""

from __future__ import annotations

import json

import pytest

from tests.experiment import small_run


def refused(*args: str, program: tuple[str, ...] = ("launch.py",)) -> str:
    code, output = small_run.finish(*args, program=program)
    assert code not in (0, None), output
    assert "Traceback" not in output, output
    return output


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--config=configs/nowhere.py"], ["configs/nowhere.py", "No such file"]),
        (["--config.num_replica=3"], ["num_replica", "num_replicas"]),
        (["--config.merge.evry=epoch"], ["evry", "every"]),
        (["--config.num_replicas=two"], ["num_replicas", "two"]),
        (["--confg=configs/glyphs.py"], ["confg", "config"]),
        (["--mode=eval"], ["--checkpoint"]),
        (["--mode=eval", "--checkpoint=/nowhere/at/all"], ["/nowhere/at/all"]),
        (["configs/glyphs.py"], ["configs/glyphs.py", "--"]),
    ],
)
def test_mistakes_that_are_seen_at_once(args, words):
    output = refused(*args)
    assert all(word in output for word in words), output


def test_mistakes_in_a_run(tmp_path):
    anchor = small_run.save_anchor(tmp_path / "clip")
    workdir = tmp_path / "run"

    output = refused(*small_run.arguments(anchor, workdir, "--config.num_replicas=1"))
    assert "num_replicas" in output and "at least 2" in output

    (workdir / "config.json").write_text(json.dumps({"epochs": 99}))
    output = refused(*small_run.arguments(anchor, workdir))
    assert "another config" in output and "epochs was 99, is 2" in output
    assert json.loads((workdir / "config.json").read_text()) == {"epochs": 99}

    output = refused(*small_run.arguments(tmp_path / "nothing", tmp_path / "other"))
    assert "nothing" in output and "no such file or directory" in output

    (tmp_path / "file").write_text("in the way")
    output = refused(*small_run.arguments(anchor, tmp_path / "file" / "run"))
    assert "workdir" in output and "file" in output


def test_a_full_disk_is_one_line_and_the_run_goes_on_afterwards(tmp_path):
    """Files may not grow past 40 kB: as on a full disk, writing fails in the middle."""
    anchor = small_run.save_anchor(tmp_path / "clip")
    arguments = small_run.arguments(anchor, tmp_path / "run")
    limited = (
        "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY)); "
        "sys.argv[0] = 'launch.py'; runpy.run_path('launch.py', run_name='__main__')"
    )
    output = refused(*arguments, program=("-c", limited))
    assert "error: cannot write" in output, output
    code, output = small_run.finish(*arguments)
    assert code == 0, output
