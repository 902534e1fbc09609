"""Outputs of mergekit 0.1.5 for a tiny base and three fine-tunes, one per recipe.

To generate `mergekit_reference.safetensors`, which contains the inputs and all outputs:

    MERGEKIT_PYTHON=/path/to/env/bin/python python -m tests.checkpoint_merge.mergekit_reference

mergekit runs in its own environment; the tests need neither mergekit nor torch.
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
    entries = [{"model": m, **({"parameters": p} if p else {})} for m, p in models.items()]
    recipe = {"merge_method": method, "models": entries, "dtype": "float32"}
    recipe |= {"base_model": base} if base else {}
    return recipe | ({"parameters": parameters} if parameters else {})


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
    "ties_rescaled": _recipe(
        "ties", {"ft1": {"density": 0.5}, "ft2": {"density": 0.3}}, weight=0.6, rescale=True
    ),
    "ties_by_tensor": _recipe(
        "ties",
        {
            "ft1": {"weight": [0.2, 0.9], "density": [{"filter": "mlp", "value": 0.3}]},
            "ft2": {"weight": [{"filter": "self_attn", "value": [0.1, 0.8]}, {"value": 0.5}]},
        },
        density=[0.9, 0.6],
        **{"lambda": [{"filter": "norm", "value": 0.5}, {"value": 0.8}]},
    ),
    # With all elements, DARE and DELLA have nothing random.
    "dare_linear": _recipe("dare_linear", {"ft1": {"weight": 0.7}, "ft2": {"weight": 0.4}}),
    "dare_ties": _recipe(
        "dare_ties", {"ft1": {"weight": 0.7}, "ft2": {"weight": 0.4}, "ft3": {"weight": 0.3}}
    ),
    "della": _recipe(
        "della", {"ft1": {"weight": 0.7}, "ft2": {"weight": 0.4}, "ft3": {"weight": 0.3}}
    ),
    "della_linear": _recipe("della_linear", {"ft1": {}, "ft2": {}}, weight=0.5, normalize=True),
    "breadcrumbs": _recipe(
        "breadcrumbs",
        {"ft1": {"density": 0.5, "gamma": 0.1}, "ft2": {"density": 0.95, "gamma": 0.2}},
        weight=0.6,
        normalize=True,
    ),
    "breadcrumbs_ties": _recipe(
        "breadcrumbs_ties",
        {"ft1": {"density": 0.5}, "ft2": {"density": 0.7}},
        weight=0.6,
        gamma=0.05,
        rescale=True,
    ),
    "sce": _recipe("sce", {"ft1": {}, "ft2": {}, "ft3": {}}),
    "sce_selected": _recipe("sce", {"ft1": {}, "ft2": {}, "ft3": {}}, select_topk=0.4),
    "ram": _recipe("ram", {"ft1": {}, "ft2": {}, "ft3": {}}, epsilon=0.02),
    "ramplus_tl": _recipe("ramplus_tl", {"ft1": {}, "ft2": {}}, epsilon=0.02, r=0.5, alpha=0.4),
    "nearswap": _recipe("nearswap", {"base": {}, "ft1": {}}, t=0.02),
    "arcee_fusion": _recipe("arcee_fusion", {"base": {}, "ft1": {}}),
    "nuslerp": _recipe("nuslerp", {"ft1": {"weight": 0.7}, "ft2": {"weight": 0.4}}),
    "nuslerp_of_weights": _recipe(
        "nuslerp", {"ft1": {"weight": 0.7}, "ft2": {"weight": 0.4}}, base=None
    ),
    "multislerp": _recipe("multislerp", {"ft1": {}, "ft2": {}, "ft3": {}}, weight=0.5),
    "multislerp_of_weights": _recipe(
        "multislerp",
        {"ft1": {"weight": 0.7}, "ft2": {"weight": 0.4}},
        base=None,
        normalize_weights=False,
    ),
    "karcher": _recipe("karcher", {"ft1": {}, "ft2": {}, "ft3": {}}, base=None),
    "karcher_with_base": _recipe("karcher", {"ft1": {}, "ft2": {}}, max_iter=20, tol=1e-6),
    "passthrough": _recipe("passthrough", {"ft1": {"scale": 0.5}}, base=None),
    "linear_sum": _recipe(
        "linear", {"ft1": {"weight": 0.7}, "ft2": {"weight": 0.4}}, base=None, normalize=False
    ),
}


def write_inputs(folder: Path, tensors: dict[str, dict[str, np.ndarray]]) -> None:
    """Write each model to a directory with its name."""
    for model in MODELS:
        (folder / model).mkdir()
        (folder / model / "config.json").write_text(json.dumps(CONFIG))
        write_tensors(folder / model / "model.safetensors", tensors[model])


def write_recipe(folder: Path, name: str) -> Path:
    """Write a recipe with absolute paths of the models."""
    recipe = json.loads(json.dumps(RECIPES[name]))
    for model in recipe["models"]:
        model["model"] = str(folder / model["model"])
    if "base_model" in recipe:
        recipe["base_model"] = str(folder / recipe["base_model"])
    path = folder / f"{name}.yml"
    path.write_text(json.dumps(recipe))  # JSON is YAML too.
    return path


def load() -> dict[str, dict[str, np.ndarray]]:
    """Return the stored inputs and outputs by name."""
    stored, models = TensorFiles(FILE), {}
    for key in stored:
        model, name = key.split("/", 1)
        models.setdefault(model, {})[name] = stored[key]
    return models


def _random_models() -> dict[str, dict[str, np.ndarray]]:
    """Return float32 models whose updates have cosines near 0.7, so all ratios are in (0, 1)."""
    rng = np.random.default_rng(0)
    models: dict[str, dict[str, np.ndarray]] = {model: {} for model in MODELS}
    for name, shape in llama_shapes().items():
        if ".layers.1." in name:
            continue
        base, common = rng.standard_normal((2, *shape))
        models["base"][name] = (0.5 * base).astype(np.float32)
        for model in MODELS[1:]:
            update = 0.02 * (common + 0.6 * rng.standard_normal(shape))
            models[model][name] = (models["base"][name] + update).astype(np.float32)
    return models


def run_mergekit(folder: Path, name: str) -> dict[str, np.ndarray]:
    """Return the output of a recipe from the mergekit in the environment of MERGEKIT_PYTHON."""
    command = [
        os.path.abspath(os.environ["MERGEKIT_PYTHON"]),
        "-m",
        "mergekit.scripts.run_yaml",
        write_recipe(folder, name),
        folder / f"mergekit_{name}",
        "--no-copy-tokenizer",
    ]
    # Its environment must not import modules of this one.
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
    return dict(TensorFiles(folder / f"mergekit_{name}"))


def main() -> None:
    """Generate the file."""
    models = _random_models()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_inputs(folder, models)
        for name in RECIPES:
            models[name] = run_mergekit(folder, name)
    write_tensors(
        FILE, {f"{m}/{n}": x for m, tensors in models.items() for n, x in tensors.items()}
    )


if __name__ == "__main__":
    main()
