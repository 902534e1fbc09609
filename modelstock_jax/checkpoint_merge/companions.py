"""Files beside the tensors: config, tokenizer, processor, generation settings."""

from __future__ import annotations

import shutil
from pathlib import Path

from modelstock_jax.checkpoint_merge.config import CONFIG, read_config
from modelstock_jax.checkpoint_merge.plan import Plan
from modelstock_jax.checkpoint_merge.sources import ENDINGS, LICENCES
from modelstock_jax.errors import UserError
from modelstock_jax.tensor_files.writer import write_json

_NOT = ("adapter_config.json", "merge_report.json")


def copy_companions(plan: Plan, directory: Path) -> None:
    """Copies what a model needs beside its tensors; the config with what the merge changed.

    Code (``*.py``) and pickles are left where they are.

    Args:
        plan: Of the merge.
        directory: Where to.
    """
    source = (plan.base, *plan.finetuned)[plan.companion].directory or plan.base.directory
    if source is None:
        return
    try:
        for path in sorted(source.iterdir()):
            if path.is_file() and _wanted(path.name):
                shutil.copyfile(path, directory / path.name)
    except OSError as error:
        where = error.filename or source
        raise UserError(f"{where}: cannot be copied ({error.strerror or error}).") from None
    if plan.config and (config := read_config(directory)) is not None:
        write_json(directory / CONFIG, {**config, **plan.config})


def _wanted(name: str) -> bool:
    if name in _NOT or name.endswith(".index.json") or name.startswith("."):
        return False
    return name.endswith(ENDINGS) or name.startswith(LICENCES)
