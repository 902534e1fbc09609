"""What mergekit 0.1.5 makes of one tiny base and three fine-tunes, recipe by recipe.

    MERGEKIT_PYTHON=/path/to/env/bin/python python -m tests.checkpoint_merge.mergekit_reference

runs it (in an environment of its own) and writes `mergekit_reference.safetensors` beside this file:
the inputs and every output, so that the tests need neither mergekit nor torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from modelstock_jax.tensor_files.reader import TensorFiles
from modelstock_jax.tensor_files.writer import write_tensors
from tests.checkpoint_merge.small import LLAMA, llama_shapes

FILE = Path(__file__).with_suffix(".safetensors")
CONFIG = LLAMA | {"num_hidden_layers": 1}
MODELS = ("base", "ft1", "ft2", "ft3")


def _recipe(method: str, models: dict[str, dict], base: str | None = "base", **parameters) -> dict:
    listed = [{"model": m, **({"parameters": p} if p else {})} for m, p in models.items()]
    found = {"merge_method": method, "models": listed, "dtype": "float32"}
    found |= {"base_model": base} if base else {}
    return found | ({"parameters": parameters} if parameters else {})


RECIPES = {
    "model_stock_2": _recipe("model_stock", {"ft1": {}, "ft2": {}}),
    "model_stock_3": _recipe("model_stock", {"ft1": {}, "ft2": {}, "ft3": {}}),
    "linear": _recipe("linear", {"ft1": {"weight": 0.7}, "ft2": {"weight": 0.4}}, base=None),
    "task_arithmetic": _recipe(
        "task_arithmetic", {"ft1": {"weight": 0.7}, "ft2": {"weight": 0.4}}, **{"lambda": 0.9}
    ),
    "ties": _recipe(
        "ties",
        {"ft1": {"weight": 0.7, "density": 0.5}, "ft2": {"weight": 0.4, "density": 0.3}},
        normalize=True,
    ),
    "slerp": _recipe("slerp", {"base": {}, "ft1": {}}, t=0.3),
}


def write_inputs(folder: Path, tensors: dict[str, dict[str, np.ndarray]]) -> None:
    """Writes each model to a directory of its name."""
    for model in MODELS:
        (folder / model).mkdir()
        (folder / model / "config.json").write_text(json.dumps(CONFIG))
        write_tensors(folder / model / "model.safetensors", tensors[model])


def write_recipe(folder: Path, name: str) -> Path:
    """Writes a recipe with the models' whole paths."""
    recipe = json.loads(json.dumps(RECIPES[name]))
    for model in recipe["models"]:
        model["model"] = str(folder / model["model"])
    if "base_model" in recipe:
        recipe["base_model"] = str(folder / recipe["base_model"])
    path = folder / f"{name}.yml"
    path.write_text(json.dumps(recipe))  # JSON is YAML too.
    return path


def load() -> dict[str, dict[str, np.ndarray]]:
    """Inputs and outputs, each by its name."""
    stored, found = TensorFiles(FILE), {}
    for key in stored:
        model, name = key.split("/", 1)
        found.setdefault(model, {})[name] = stored[key]
    return found


def _draw() -> dict[str, dict[str, np.ndarray]]:
    """Float32 weights; movements with cosines near 0.7, so that every ratio is within (0, 1)."""
    rng = np.random.default_rng(0)
    found: dict[str, dict[str, np.ndarray]] = {model: {} for model in MODELS}
    for name, shape in llama_shapes().items():
        if ".layers.1." in name:
            continue
        base, common = rng.standard_normal((2, *shape))
        found["base"][name] = (0.5 * base).astype(np.float32)
        for model in MODELS[1:]:
            moved = 0.02 * (common + 0.6 * rng.standard_normal(shape))
            found[model][name] = (found["base"][name] + moved).astype(np.float32)
    return found


def made(folder: Path, name: str) -> dict[str, np.ndarray]:
    """What the mergekit of MERGEKIT_PYTHON's environment makes of a recipe."""
    command = [
        os.path.abspath(os.environ["MERGEKIT_PYTHON"]),
        "-m",
        "mergekit.scripts.run_yaml",
        write_recipe(folder, name),
        folder / f"theirs_{name}",
        "--no-copy-tokenizer",
    ]
    # Its environment is its own: nothing of ours is on its path.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"mergekit failed:\n{done.stderr}")
    return dict(TensorFiles(folder / f"theirs_{name}"))


def main() -> None:
    """Makes the file."""
    found = _draw()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_inputs(folder, found)
        for name in RECIPES:
            found[name] = made(folder, name)
    write_tensors(FILE, {f"{m}/{n}": x for m, tensors in found.items() for n, x in tensors.items()})


if __name__ == "__main__":
    main()
