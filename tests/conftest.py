"""Strict settings for all tests: eight CPU devices, no implicit broadcasting, warnings are errors.

Shared test code is imported from the repository root: `from tests.<folder>.<module> import ...`.
Warnings become errors in pyproject.toml (`filterwarnings`).
"""

from __future__ import annotations

import gc
import importlib.util
import os
from pathlib import Path

from tests import compiler_flags

# These are read at the first import of jax, transformers or matplotlib.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        compiler_flags.FLAGS,
        "--xla_force_host_platform_device_count=8",
    )
).strip()
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_ENABLE_X64"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
# Tests and the processes that they start compile the same programs; cache them.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parents[1] / ".pytest_cache/xla")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

# The time of an example shows the load of the machine, not an error.
hypothesis.settings.register_profile("any_load", deadline=None)
hypothesis.settings.load_profile("any_load")

TESTS = Path(__file__).parent
PARITY = TESTS / "parity"
# Files and folders that take longer, because they compile, train or start processes.
# `make test-fast` runs all other tests.
NOT_FAST = {
    *("training", "kill", "notebooks"),
    *(
        f"experiment/test_{name}.py"
        for name in (
            "dry_run",
            "image_models",
            "mistakes",
            "pretrain",
            "processes",
            "run",
            "stored_images_at_once",
            "zero_shot_head",
        )
    ),
    *(
        f"merging/test_{name}.py"
        for name in (
            "anchor_rounding",
            "baselines",
            "callers",
            "dare",
            "every_merge",
            "gradients",
            "landscape",
            "large",
            "lowering",
            "meshes",
            "outcomes",
            "reference",
            "settings",
            "single_model",
            "trajectory",
            "undefined",
        )
    ),
    *(
        f"studies/test_{name}.py"
        for name in (
            "anchors",
            "command",
            "controls",
            "expressions",
            "measurements",
            "ratio_rules",
            "runner",
            "sentences",
            "studies",
        )
    ),
    *(
        f"checkpoint_merge/test_{name}.py"
        for name in (
            "adapter_merge",
            "command_line",
            "single_model",
            "training_agrees",
            "vocabulary",
        )
    ),
    *(
        f"data/test_{name}.py"
        for name in ("augment", "cifar", "glyph_captions", "glyph_images", "glyph_sets")
    ),
    *("models/test_model.py", "models/test_towers.py", "docs/test_blocks.py"),
    *("reporting/test_figures.py", "test_benchmarks.py", "test_configs.py", "test_evaluation.py"),
    *("test_examples.py", "test_gpu_benchmark.py"),
}


@pytest.fixture
def x64():
    """Enable float64 in one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True, scope="module")
def _drop_programs():
    """Drop the compiled programs of a file: those of all files take gigabytes."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(autouse=True, scope="session")
def _eight_devices():
    # If jax was imported before this file, the settings above have no effect.
    assert jax.device_count() == 8, "jax was imported before tests/conftest.py"


def pytest_ignore_collect(collection_path):
    """Ignore tests/parity if torch is missing, because it cannot be imported."""
    if PARITY in (collection_path, *collection_path.parents):
        return True if importlib.util.find_spec("torch") is None else None
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        paths = {item.path, *item.path.parents}
        if PARITY in paths:
            item.add_marker(pytest.mark.parity)
        elif not item.get_closest_marker("slow") and paths.isdisjoint(TESTS / n for n in NOT_FAST):
            item.add_marker(pytest.mark.fast)
