"""config.json: what it says of a model, and the dtype that it must say of a merged one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modelstock_jax.tensor_files.reader import read_json
from modelstock_jax.tensor_files.writer import write_json

CONFIG = "config.json"
KEYS = ("torch_dtype", "dtype")  # transformers 4 and 5; 5 reads both


def read_config(directory: Path | None) -> dict[str, Any] | None:
    """The config.json of a model's directory; None where there is none, or no JSON object in it.

    Args:
      directory: None for a model that is a single file.

    Raises:
      UserError: a config.json that cannot be read, or is not JSON.

    Example:
      >>> read_config(None) is None
      True
    """
    if directory is None or not (directory / CONFIG).is_file():
        return None
    config = read_json(directory / CONFIG)
    return config if isinstance(config, dict) else None


def set_dtype(directory: Path, dtype: str) -> None:
    """Makes config.json, and the configs of towers within it, say `dtype`.

    Args:
      directory: with a config.json, or without one: then nothing is done.
      dtype: as transformers writes it, like `bfloat16`.
    """
    config = read_config(directory)
    if config is not None:
        config = _with_dtype(config, dtype)
        if not any(key in config for key in KEYS):
            config["torch_dtype"] = dtype
        write_json(directory / CONFIG, config)


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config with the dtype wherever one was said.

    Example:
      >>> _with_dtype({"dtype": "float32", "text_config": {"torch_dtype": "float32"}}, "float16")
      {'dtype': 'float16', 'text_config': {'torch_dtype': 'float16'}}
    """
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key in KEYS:
            changed[key] = dtype
        elif isinstance(value, dict) and key.endswith("_config"):
            changed[key] = _with_dtype(value, dtype)
        else:
            changed[key] = value
    return changed
