"""Metrics after a restart, progress lines and bars, and the model card."""

import io
import json
import tempfile
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tensorboardX
from rich.console import Console

from modelstock_jax.errors import UserError
from modelstock_jax.fileio import read_lines
from modelstock_jax.reporting import figures, metrics, model_card
from modelstock_jax.reporting.metrics import MetricsWriter, read_metrics
from modelstock_jax.reporting.progress import Progress
from modelstock_jax.reporting.tables import make_row
from tests.reporting import made_up


def test_scalars_of_every_kind(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": jnp.float32(2.5), "lr": np.float64(1e-3), "bad": float("nan")})
        writer.flush()
        assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.5, "lr": 1e-3, "bad": None}]
    writer.close()
    (board,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in board.read_bytes()


def written_to_board(monkeypatch, *lines):
    """Return the tags of scalars, and {tag: values} of histograms."""
    scalars, histograms = set(), {}

    def add_scalar(self, tag, value, step):
        scalars.add(tag)

    def add_histogram(self, tag, values, step):
        histograms[tag] = values

    monkeypatch.setattr(tensorboardX.SummaryWriter, "add_scalar", add_scalar)
    monkeypatch.setattr(tensorboardX.SummaryWriter, "add_histogram", add_histogram)
    with tempfile.TemporaryDirectory() as directory, MetricsWriter(directory) as writer:
        for line in lines:
            writer.write(1, line)
        writer.flush()
        kept = read_metrics(directory)
    assert kept == [{"step": 1, **line} for line in lines], "the file has every value"
    return scalars, histograms


def test_tensorboard_has_histograms_of_the_tensors(monkeypatch):
    names = [f"image_tower.tensor_{i}" for i in range(100)]
    merge = {"merge/epoch": 1.0}
    merge |= {f"merge/cosine/{name}": 0.5 for name in names}
    merge |= {f"merge/ratio/{name}": 0.01 * i for i, name in enumerate(names)}
    merge["merge/cosine/frozen"] = merge["merge/ratio/frozen"] = None
    step = {f"train/loss/replica_{r}": float(r) for r in range(4)}
    scalars, histograms = written_to_board(monkeypatch, merge, step)
    summaries = {f"merge/{x}/{y}" for x in ("angle", "ratio") for y in ("mean", "min", "max")}
    assert scalars == {"merge/epoch", *step, *summaries}
    np.testing.assert_allclose(histograms["merge/angle"], [60] * 100)
    np.testing.assert_allclose(histograms["merge/ratio"], 0.01 * np.arange(100))


def test_tensorboard_has_few_tags_for_many_replicas(monkeypatch):
    series = ("loss", "accuracy", "grad_norm", "learning_rate")
    step = {f"train/{name}/replica_{r}": float(r) for name in series for r in range(5)}
    scalars, histograms = written_to_board(monkeypatch, step)
    assert scalars == {f"train/{name}/{y}" for name in series for y in ("mean", "min", "max")}
    assert list(histograms["train/loss"]) == [0, 1, 2, 3, 4]


def test_resume_drops_later_and_incomplete_lines(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": step / 2})
    expected = (tmp_path / "metrics.jsonl").read_bytes()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"loss": 3.0, "st')
    with MetricsWriter(tmp_path, restored_step=3) as writer:
        assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2, 3]
        for step in (4, 5):
            writer.write(step, {"loss": step / 2})
    assert (tmp_path / "metrics.jsonl").read_bytes() == expected


def test_timings_of_every_start_are_in_a_separate_file(tmp_path):
    def start(restored, steps):
        with MetricsWriter(tmp_path, restored) as writer:
            for step in steps:
                writer.write(step, {"loss": 1.0})
                writer.write_performance(step, {"time/step": 0.5})
            return writer.furthest

    assert start(None, (1, 2, 3)) == 0
    assert start(1, (2, 3)) == 3, "steps 2 and 3 were run before"
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2, 3]
    assert [e["step"] for e in read_lines(tmp_path / "performance.jsonl")] == [1, 2, 3, 2, 3]
    assert "time" not in (tmp_path / "metrics.jsonl").read_text()


def test_new_run_starts_a_new_file(tmp_path):
    for _ in range(2):
        with MetricsWriter(tmp_path) as writer:
            writer.write(0, {"loss": 1.0})
    assert len(read_metrics(tmp_path)) == 1


def test_other_processes_write_nothing(tmp_path):
    with MetricsWriter(tmp_path, enabled=False) as writer:
        writer.write(1, {"loss": 1.0})
        writer.flush()
    assert list(tmp_path.iterdir()) == []


def test_full_disk_error_explains_how_to_resume(tmp_path, monkeypatch):
    class FullDisk(io.StringIO):
        def flush(self):
            raise OSError(28, "No space left on device")

    with MetricsWriter(tmp_path) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(writer._files.metrics, "_file", FullDisk())
            writer.write(1, {"loss": 1.0})
            with pytest.raises(UserError, match=r"metrics\.jsonl: No space left .*resume"):
                writer.flush()


class Clock:
    """A clock that the test advances."""

    now = 0.0

    def __call__(self):
        return self.now


def run(total, seconds_per_step, **options):
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, width=200)
    with Progress("train", total, console=console, clock=clock, **options) as progress:
        for step in range(options.get("done", 0) + 1, total + 1):
            clock.now += seconds_per_step if step > 1 else 60  # The first step compiles.
            progress.update(step, {"loss": 1 / step})
    return out.getvalue().splitlines(), progress


def test_lines_are_few_and_show_rate_and_time_left():
    lines, progress = run(1000, 0.25, images_per_step=128)
    assert 4 <= len(lines) <= 12
    assert progress.rate() == pytest.approx(4.0, rel=1e-9)  # exact except for float64 rounding
    middle = lines[len(lines) // 2]
    assert middle.startswith("train  ") and "512 images/s" in middle and " left" in middle
    assert lines[-1] == "train  1000/1000 (100 %)  512 images/s  0:00 left  loss 0.001"
    done = int(middle.split()[1].split("/")[0])
    seconds = (1000 - done) / 4
    assert f"{int(seconds // 60)}:{round(seconds % 60):02} left" in middle


def test_slow_loop_prints_one_line_per_minute():
    lines, _ = run(1000, 20.0)
    assert len(lines) == pytest.approx(1000 / 3, rel=0.01)  # 3 steps per minute


def test_short_loop_prints_only_its_end():
    lines, _ = run(20, 0.1, done=10)
    assert len(lines) == 1 and "20/20 (100 %)" in lines[0]


def paused_run(pause, **options):
    """Return the lines of a loop of 4 steps per second with a pause after step 40, and its end."""
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, width=200, **options)
    with Progress("train", 1000, console=console, clock=clock) as progress:
        for step in range(1, 49):
            clock.now += 0.25
            if step == 40:
                pause(progress, clock)
            progress.update(step)
        return progress, out.getvalue().splitlines()


def test_pause_is_not_part_of_the_rate():
    def pause(progress, clock):
        progress.begin_pause("compiling ...")
        clock.now += 5
        progress.begin_pause("compiling ...")
        clock.now += 5
        progress.end_pause()
        progress.end_pause()
        progress.end_pause()  # Without a pause: nothing happens.

    progress, _ = paused_run(pause)
    assert progress.rate() == pytest.approx(4.0, rel=1e-9)
    assert " 3:58 left" in progress.text()


def test_long_pause_prints_one_line_between_two_updates(monkeypatch):
    monkeypatch.setattr("modelstock_jax.reporting.progress.PAUSE_SECONDS", 0.05)

    def pause(progress, clock):
        progress.begin_pause("compiling ...")  # Too short for a line.
        progress.end_pause()
        time.sleep(0.2)
        for _ in range(2):
            progress.begin_pause("compiling ...")
            time.sleep(0.2)
            progress.end_pause()

    _, lines = paused_run(pause)
    assert [line for line in lines if "compiling" in line] == [
        "train  39/1000 (4 %)  compiling ..."
    ]


def test_bar_shows_a_pause():
    def pause(progress, clock):
        progress.begin_pause("compiling ...")
        progress._bar.refresh()
        progress.end_pause()

    _, lines = paused_run(pause, force_terminal=True, _environ={"TERM": "xterm"})
    assert any("compiling ..." in line for line in lines)


def test_terminal_shows_a_bar():
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True, _environ={"TERM": "xterm"})
    with Progress("train", 10, console=console) as progress:
        progress.update(10, {"loss": 0.5})
        progress.log("epoch 1 of 1")
    assert "━" in out.getvalue() and "10/10" in out.getvalue() and "epoch 1 of 1" in out.getvalue()


def test_disabled_progress_is_silent():
    lines, _ = run(10, 100.0, enabled=False)
    assert lines == []


def test_model_card():
    rows = made_up.rows()
    stock = next(row for row in rows if row["method"] == "model_stock")
    stock["exported"] = True
    options = dict(
        name="Glyph CLIP, Model Stock",
        row=stock,
        anchor="glyph-clip",
        anchor_checksum="sha256:0123abcd",
        num_replicas=2,
        unit="tensor",
        rows=rows,
        ratios={
            "first merge (epoch 1)": figures.ratio_summary(made_up.report()),
            "last merge (epoch 8)": {"kernels": dict(median=1, low=0.999, high=1, count=9)},
        },
        command="python launch.py",
    )
    _, front, body = model_card.model_card(**options).split("---\n", 2)
    entries = dict(line.split(": ", 1) for line in front.splitlines())
    assert "model-stock" in json.loads(entries["tags"])
    for text in [
        "| checksum of the anchor's weights | `sha256:0123abcd` |",
        "| | units | first merge (epoch 1) | last merge (epoch 8) |",
        "| row in the results of the run | Model Stock, after training |",
        "| Model Stock, after training (exported) |",
        "python launch.py",
        "jax 0.",
        "modelstock_jax 0.1",
    ]:
        assert text in body, text
    kernels = options["ratios"]["first merge (epoch 1)"]["kernels"]
    cells = f"| {kernels['median']:.3f} ({kernels['low']:.3f} to {kernels['high']:.3f}) | "
    assert f"{cells}1.000 (0.999 to 1.000) |" in body
    assert "late merge" in body and "| norms " in body


def test_model_card_of_a_model_that_is_not_a_model_stock():
    single = make_row("single_model", id=1.0, shifts={}, seed=3, cost=1, replica=0)
    curve = make_row("wise_ft", id=1.0, shifts={}, cost=2, alpha=0.5, of="uniform_mean")
    for row, sentence in (
        (single, "Single fine-tuned model: a fine-tuned copy of org/vit."),
        (curve, "WiSE-FT of the uniform mean, α = 0.5: 2 fine-tuned copies of org/vit, merged."),
    ):
        text = model_card.model_card(
            name="m", row=row, anchor="org/vit", anchor_checksum="0", num_replicas=2,
            unit="tensor", model_type="vit", rows=[row],
        )  # fmt: skip
        assert sentence in text and "## Ratios" not in text
        assert "AutoModelForImageClassification" in text and "head.safetensors" not in text
    assert "α = 0.5 |" in text, "every point of a curve is shown"


def test_reporting_imports_no_jax():
    import subprocess
    import sys

    code = (
        "import sys\nfrom modelstock_jax.reporting import figures, model_card, progress, tables, "
        "metrics\nassert 'jax' not in sys.modules"
    )
    root = Path(metrics.__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=60)


def test_tables_and_cards_import_no_matplotlib():
    import subprocess
    import sys

    code = (
        "import sys\nfrom modelstock_jax.reporting import model_card, tables\n"
        "assert 'matplotlib' not in sys.modules"
    )
    root = Path(metrics.__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=60)
