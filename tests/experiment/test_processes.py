"""One run as several processes: the same results, and one line for every error."""

from __future__ import annotations

import json
import re
import signal
import socket
import time
from functools import cache

import numpy as np
import pytest

from modelstock_jax.errors import UserError
from modelstock_jax.training import launcher
from tests.data.made_images import write_folders
from tests.experiment import processes, small_run
from tests.test_evaluation import CLASSES, image_set

PARTS = ("-m", "tests.experiment.parts_of_a_job")


def test_two_processes_agree_and_count_every_image_once(tmp_path):
    ended = processes.run(2, f"--workdir={tmp_path}", program=PARTS, devices=2)
    assert [code for code, _, _ in ended] == [0, 0], str(ended)
    assert ended[0][1].count("only process 0 prints 0") == 1
    first, second = (json.loads(out[out.index("{") :]) for _, out, _ in ended)
    assert ended[1][1].startswith("{"), "process 1 printed something"
    assert first.pop("main") and not second.pop("main")
    # If the replica axis is split over processes, each has one replica with all examples.
    assert first["(2, 2)"].pop("local_indices") == [[0], [0, 1, 2, 3, 4, 5, 6, 7]]
    assert second["(2, 2)"].pop("local_indices") == [[1], [0, 1, 2, 3, 4, 5, 6, 7]]
    assert first["(1, 4)"].pop("local_indices") == [[0, 1], [0, 1, 2, 3]]
    assert second["(1, 4)"].pop("local_indices") == [[0, 1], [4, 5, 6, 7]]
    assert first == second
    assert first["devices"] == 4 and first["restored"] == [True, True]
    assert first["broadcast"] == [7, False] and first["any_process"] == [True, False]
    for mesh in ("(2, 2)", "(1, 4)"):
        assert first[mesh]["to_host"] and first[mesh]["device_put_global"]
        assert first[mesh]["shape"] == [2, 8, 3]
        # Batches of 6, rounded up to 8 for four devices, over sets of 13, 1 and 8 images.
        assert first[mesh]["progress"] == [8, 13, 14, 22]
        assert first[mesh]["accuracy"] == expected_accuracies()
    # Process 1 gets the signal before its third step; both stop after the same later step.
    assert first["should_stop"] == [False, False, False, True, True, True]


def expected_accuracies() -> dict[str, float]:
    accuracies = {}
    bias = np.linspace(-20, 20, CLASSES, dtype=np.float32)
    for images in (image_set(13), image_set(1), image_set(8, (1, 4, 5))):
        logits = images.images[:, 0, :, 0] + bias
        allowed = np.array(images.classes or range(CLASSES))
        choice = allowed[logits[:, allowed].argmax(-1)]
        accuracies[images.name] = 100 * int((choice == images.labels).sum()) / len(images)
    return accuracies


@pytest.mark.slow
def test_processes_wait_for_one_that_compiles_for_long():
    ended = processes.run(4, "--mistake=late", program=PARTS)
    assert [(code, out) for code, out, _ in ended] == [(0, "3.0")] * 4, str(ended)


def one_line(stderr: str) -> str:
    """Return the only line of a failed process, which has no C++ or Python trace."""
    lines = stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), stderr
    return lines[0]


@pytest.mark.slow
def test_error_lists_the_differences_between_configs():
    ended = processes.run(2, "--mistake=other config", program=PARTS)
    assert [code for code, _, _ in ended] == [1, 1], str(ended)
    # Process 0 ends at once; process 1 lists the differences, unless it detects that end first.
    lines = [one_line(err) for _, _, err in ended if err]
    assert any("config" in line or "process 0 " in line for line in lines)


def test_killed_process_ends_the_job_with_one_line():
    start_time = time.monotonic()
    first, second = processes.run(2, "--mistake=lost", program=PARTS)
    assert first[0] == -signal.SIGKILL and second[0] == 1, (first, second)
    assert "process 1: " in one_line(second[2]) and "lost" in one_line(second[2])
    assert time.monotonic() - start_time < launcher.HEARTBEAT_SECONDS + 60


SLURM = {"SLURM_STEP_NODELIST": "node[0-3]", "SLURM_NTASKS": "4"}
JAX = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}


@pytest.mark.parametrize(
    ("flags", "environ", "spec"),
    [
        ((None, None, None), {}, None),
        ((None, 1, 0), {}, None),
        (("a:1", 1, 0), {}, None),
        (("a:1", 2, 0), {}, ("a:1", 2, 0)),
        ((None, None, None), JAX, ("a:1", 4, 3)),
        (("b:2", None, 0), JAX, ("b:2", 4, 0)),
        # The index of a Kubernetes job is the process id.
        (
            (None, None, None),
            {
                "JAX_COORDINATOR_ADDRESS": "a:1",
                "JAX_NUM_PROCESSES": "2",
                "JOB_COMPLETION_INDEX": "1",
            },
            ("a:1", 2, 1),
        ),
        ((None, None, None), SLURM, (None, None, None)),
        (("a:1", None, None), SLURM, ("a:1", None, None)),
        ((None, None, None), SLURM | {"SLURM_NTASKS": "1"}, None),
        ((None, None, None), {"SLURM_NTASKS": "4"}, None),  # Not started by srun.
        (
            (None, None, None),
            {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:5", "OMPI_COMM_WORLD_SIZE": "2"},
            (None, None, None),
        ),
    ],
)
def test_process_spec(flags, environ, spec):
    assert launcher.detect_cluster(*flags, environ) == spec


@pytest.mark.parametrize(
    ("flags", "environ", "message"),
    [
        ((None, 2, None), {}, "--coordinator_address and --process_id "),
        (("a:1", None, 1), {}, "--num_processes "),
        (("a", 2, 1), {}, "--coordinator_address=a: .*HOST:PORT"),
        (("a:1", 2, 2), {}, "--process_id=2: .* 0 .*1.*--num_processes=2"),
        (("a:1", 0, 0), {}, "--num_processes=0"),
        (("a:1", 1, 1), {}, "--process_id=1: .* 0 .*0"),
        ((None, None, None), {"JAX_PROCESS_ID": "x"}, "JAX_PROCESS_ID='x'"),
    ],
)
def test_error_for_an_invalid_process_spec(flags, environ, message):
    with pytest.raises(UserError, match="^" + message):
        launcher.detect_cluster(*flags, environ)


def test_hosts_of_a_tpu_pod():
    endpoints = "unknown:unknown:10.0.0.1,unknown:unknown:10.0.0.2"
    assert launcher._tpu_hosts({}, lambda name: endpoints) == 2
    assert launcher._tpu_hosts({"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, None) in (0, 4)
    slices = {"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "2"}
    assert launcher._tpu_hosts(slices, lambda name: "") == 4
    assert launcher._tpu_hosts({"TPU_SKIP_MDS_QUERY": "1"}, lambda name: endpoints) == 0


def test_error_without_a_coordinator(monkeypatch):
    monkeypatch.setattr(launcher, "START_SECONDS", 0.3)
    with pytest.raises(UserError, match="127.0.0.1:.*process 0"):
        launcher._wait_for(f"127.0.0.1:{processes.free_port()}")
    with socket.create_server(("127.0.0.1", 0)) as server:
        launcher._wait_for(f"127.0.0.1:{server.getsockname()[1]}")


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (
            "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n1\n3\n"
            "The tasks have crashed. Check the task logs for an earlier error",
            "process 1, 3 ",
        ),
        (
            "UNAVAILABLE: Failed to send RPC to coordination service. Either the leader task was",
            "process 0 ",
        ),
        (
            "DEADLINE_EXCEEDED: Deadline Exceeded\n\nRPC: /xla.coordination.CoordinationService/"
            "RegisterTask",
            "all processes",
        ),
        ("INTERNAL: something new", "another process"),
    ],
)
def test_jax_error_of_a_lost_process_becomes_one_line(message, words):
    line = launcher.lost_process_message(message)
    assert words in line and "\n" not in line


FILES = ("results.md", "results.json", "model/model.safetensors", "model/head.safetensors")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """workdir -> arguments of a short run: only with merging, two epochs of eight steps."""
    anchor = small_run.save_anchor(tmp_path_factory.mktemp("anchor") / "clip")
    return lambda workdir, *more: small_run.arguments(
        anchor,
        workdir,
        "--config.compare=False",
        "--config.export.which=merged",
        "--config.evaluation.max_shift_images=100",
        *more,
    )


# A 2 x 2 mesh; every kernel of the tiny CLIP is sharded over the data axis.
SHARDED = ("--config.mesh.replica=2", "--config.mesh.data=2", "--config.mesh.fsdp_min_size=64")


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    """Number of devices -> workdir of a run of one process; with four, weights are sharded."""

    @cache
    def workdir_of(devices):
        workdir = tmp_path_factory.mktemp(f"one_process_{devices}")
        more = SHARDED if devices == 4 else ()
        ended = processes.run(1, *arguments(workdir, *more), devices=devices)
        assert ended[0][0] == 0, str(ended)
        return workdir

    return workdir_of


def assert_same(workdir, other):
    for name in FILES:
        assert (workdir / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices"), [(2, 1), (2, 2), (4, 1)])
def test_files_are_bitwise_those_of_one_process(count, devices, arguments, finished, tmp_path):
    """The same mesh gives bitwise identical files for any number of processes."""
    more = SHARDED if count * devices == 4 else ()
    ended = processes.run(count, *arguments(tmp_path, *more), devices=devices)
    assert [code for code, _, _ in ended] == [0] * count, str(ended)
    assert "Model Stock" in ended[0][1] and not any(out for _, out, _ in ended[1:])
    assert_same(tmp_path, finished(count * devices))


def wait_for_state(workdir, step, jobs):
    """Wait until a training state of at least `step` is saved."""
    state = workdir / "runs/seed_0/merged/state"
    deadline = time.monotonic() + 300
    while not any(int(p.name) >= step for p in state.glob("*") if p.name.isdigit()):
        assert all(job.poll() is None for job in jobs), processes.finish(jobs)
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("killed", "restarted"), [(1, 1), (0, 2)])
def test_resume_after_a_kill_with_another_number_of_processes(
    killed, restarted, arguments, finished, tmp_path
):
    jobs = processes.start(2, *arguments(tmp_path))
    wait_for_state(tmp_path, 3, jobs)
    jobs[killed].kill()
    start_time = time.monotonic()
    ended = processes.finish(jobs)
    assert time.monotonic() - start_time < launcher.HEARTBEAT_SECONDS + 60
    assert ended[killed][0] == -signal.SIGKILL and ended[1 - killed][0] == 1, str(ended)
    assert "process" in one_line(ended[1 - killed][2])
    again = processes.run(restarted, *arguments(tmp_path), devices=2 // restarted)
    assert [code for code, _, _ in again] == [0] * restarted, again
    assert "from step" in again[0][1]
    assert_same(tmp_path, finished(2))


@pytest.mark.slow
@pytest.mark.parametrize("signaled", [(1,), (0, 1)])
def test_sigterm_to_one_or_all_saves_one_step(signaled, arguments, finished, tmp_path):
    jobs = processes.start(2, *arguments(tmp_path))
    wait_for_state(tmp_path, 3, jobs)
    for number in signaled:
        jobs[number].send_signal(signal.SIGTERM)
    ended = processes.finish(jobs)
    assert [code for code, _, _ in ended] == [143, 143], str(ended)
    step = int(re.search(r"stopped .*step (\d+)", ended[0][1])[1])
    assert (tmp_path / f"runs/seed_0/merged/state/{step}").is_dir()
    again = processes.run(2, *arguments(tmp_path))
    assert [code for code, _, _ in again] == [0, 0], again
    assert f"from step {step}" in again[0][1]
    assert_same(tmp_path, finished(2))


@pytest.mark.slow
def test_one_process_writes_the_cache_and_two_evaluate_like_one(tmp_path):
    anchor = small_run.save_anchor(tmp_path / "clip")
    for split in ("train", "test"):
        write_folders(tmp_path / "mine" / split, ["a", "b", "c"], 7)
    command = (
        "--config=configs/folder.py",
        f"--config.data.root={tmp_path / 'mine'}",
        f"--config.data.decoded_cache_dir={tmp_path / 'cache'}",
        f"--config.pretrained={anchor}",
        f"--workdir={tmp_path / 'run'}",
        "--config.batch_size=8",
        "--config.epochs=1",
        "--config.compare=False",
        "--config.evaluation.batch_size=5",
    )
    ended = processes.run(2, *command)
    assert [code for code, _, _ in ended] == [0, 0], str(ended)
    assert (tmp_path / "cache/cache.json").exists() and not list(tmp_path.glob("cache/*.tmp"))
    row = json.loads((tmp_path / "run/results.json").read_text())["rows"][-1]
    checkpoint = ("--mode=eval", f"--checkpoint={tmp_path / 'run/model'}")
    for count in (1, 2):
        ended = processes.run(count, *command, *checkpoint)
        assert [code for code, _, _ in ended] == [0] * count, str(ended)
        assert f"{row['id']:.2f}" in ended[0][1] and "evaluate  21/21 (100 %)" in ended[0][1]
        assert not any(out for _, out, _ in ended[1:])
