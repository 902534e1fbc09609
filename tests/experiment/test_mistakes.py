"""User errors on the command line: one line, a non-zero exit code, no traceback, nothing lost."""

from __future__ import annotations

import errno
import json
import os

import pytest

from configs import folder, glyphs
from modelstock_jax.errors import UserError
from modelstock_jax.experiment import evaluate_checkpoint, run
from tests.data.made_images import write_folders
from tests.experiment import small_run


def fail(*args: str, program: tuple[str, ...] = ("launch.py",)) -> str:
    code, output = small_run.finish(*args, program=program)
    assert code not in (0, None), output
    assert "Traceback" not in output, output
    return output


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--mode=eval"], ["--checkpoint"]),
        (["--mode=eval", "--checkpoint=/nowhere/at/all"], ["/nowhere/at/all"]),
        (["configs/glyphs.py"], ["configs/glyphs.py", "--"]),
    ],
)
def test_invalid_arguments(args, words):
    output = fail(*args)
    assert all(word in output for word in words), output


def test_errors_of_a_run(tmp_path):
    anchor = small_run.save_anchor(tmp_path / "clip")
    workdir = tmp_path / "run"

    output = fail(*small_run.arguments(anchor, workdir, "--config.num_replicas=1"))
    assert "num_replicas" in output and " 2" in output
    assert not workdir.exists()

    # How launch.py handles a UserError is tested above; these need no separate process.
    config = glyphs.get_config()
    config.pretrained = str(anchor)
    (workdir / "runs").mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps({"epochs": 99}))
    with pytest.raises(UserError, match=" epochs .*99.* 8"):
        run(config, workdir)
    assert json.loads((workdir / "config.json").read_text()) == {"epochs": 99}
    (tmp_path / "file").write_text("a file")
    with pytest.raises(UserError, match="workdir.*file"):
        run(config, tmp_path / "file" / "run")
    config.pretrained = str(tmp_path / "nothing")
    with pytest.raises(UserError, match="/nothing: "):
        run(config, tmp_path / "other")


def test_errors_that_need_no_model_are_raised_before_it_is_opened(tmp_path):
    config = glyphs.get_config()
    config.pretrained = str(tmp_path / "nothing")
    config.mesh.data = 3
    with pytest.raises(UserError, match="mesh.data=3 .*batch_size=128"):
        run(config, tmp_path / "run")
    config.mesh.data, config.data.name = 0, "imagenet"
    with pytest.raises(UserError, match="data.root .*--config.data.root=DIR"):
        run(config, tmp_path / "run")
    with pytest.raises(UserError, match="data.root "):
        evaluate_checkpoint(config, "nobody/nothing")
    config.data.root = str(tmp_path)
    with pytest.raises(UserError, match=r"imagenet2012_train .*PATH \(6 .*--dry-run"):
        run(config, tmp_path / "run")


def test_error_for_a_part_of_a_workdir_that_is_no_model(tmp_path):
    state = tmp_path / "runs/seed_0/merged/state/8"
    for path in (state, tmp_path / "model"):
        path.mkdir(parents=True)
    with pytest.raises(UserError, match=f"merged model .*{tmp_path}/model"):
        evaluate_checkpoint(glyphs.get_config(), str(tmp_path))
    with pytest.raises(UserError, match="state/8 .*seed_0/merged/models"):
        evaluate_checkpoint(glyphs.get_config(), str(state))


def test_full_disk_is_one_line_and_the_run_resumes(tmp_path):
    """Files are limited to 40 kB: writing fails in the middle, as on a full disk."""
    anchor = small_run.save_anchor(tmp_path / "clip")
    arguments = small_run.arguments(anchor, tmp_path / "run", *small_run.SHORT)
    limited = (
        "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY)); "
        "sys.argv[0] = 'launch.py'; runpy.run_path('launch.py', run_name='__main__')"
    )
    output = fail(*arguments, program=("-c", limited))
    assert "error: " in output and os.strerror(errno.EFBIG) in output, output
    code, output = small_run.finish(*arguments)
    assert code == 0, output


def test_too_few_validation_images_for_tpgm_are_an_error_before_training(tmp_path):
    config = folder.get_config()
    config.pretrained = str(small_run.save_anchor(tmp_path / "clip"))
    for split in ("train", "val", "test"):
        write_folders(tmp_path / "mine" / split, ["a", "b"], 4)
    write_folders(tmp_path / "mine/shifts/sketch", ["a"], 1)
    config.data.root, config.batch_size = str(tmp_path / "mine"), 16
    config.optimizer.projection.name = "tpgm"
    with pytest.raises(UserError, match="tpgm.*batch_size=16.* 8 validation images"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run/heads").exists() and not (tmp_path / "run/runs").exists()
