"""Names of models: a path here, or a repository of Hugging Face's hub."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from modelstock_jax.errors import UserError
from modelstock_jax.tensor_files.reader import PICKLES

# A model without its pickles and code: tensors, configs, the tokenizer's files.
FILES = ("*.safetensors", "*.json", "*.txt", "*.model")
# Whatever is asked for: files that run code when they are opened, and folders of other exports.
NEVER = (*(f"*{suffix}" for suffix in PICKLES), "*.py", "*/*")
# ORG/NAME or ORG/NAME@REVISION.
HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")


def resolve(name: str | os.PathLike[str], patterns: Sequence[str] = FILES) -> Path:
    """The path that a model's name stands for, fetched from the hub where it is not here.

    A path that exists wins over a repository of the same spelling. From the hub come only the
    files of the repository's top folder that match `patterns`, never a pickle or code, into
    Hugging Face's own cache; with ``HF_HUB_OFFLINE=1`` that cache is all there is.

    Args:
        name: A path, or ``ORG/NAME`` or ``ORG/NAME@REVISION`` (a branch, tag or commit). An
            `os.PathLike` is only ever a path.
        patterns: Names of files to fetch, with ``*`` for anything.

    Returns:
        The path as it was given, or a directory of the cache.

    Raises:
        UserError: No such path, and no such repository or revision, a gated one, or no way to the
            hub.

    Example:
        >>> resolve(".").is_dir()
        True
    """
    path = Path(name)
    if os.path.exists(path):
        return path
    if not isinstance(name, str) or (match := HUB_ID.fullmatch(name)) is None:
        raise UserError(f"{name}: no such file or directory.")
    if path.suffix in (*PICKLES, ".safetensors", ".json"):
        raise UserError(f"{name}: no such file.")
    return _fetch(name, match["repo"], match["revision"], patterns)


def _fetch(name: str, repo: str, revision: str | None, patterns: Sequence[str]) -> Path:
    # Half a second: only where the hub is asked.
    from huggingface_hub import constants, errors, snapshot_download

    here = f"{name}: no such path here"
    page = f"{constants.ENDPOINT}/{repo}"
    try:
        return Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(NEVER)
            )
        )
    except errors.GatedRepoError:  # A kind of RepositoryNotFoundError.
        reason = f"{repo} is gated: accept its terms at {page}, then `hf auth login`"
        raise UserError(f"{here}, and {reason}.") from None
    except errors.RepositoryNotFoundError:
        reason = f"no repository {page} (a private one needs `hf auth login`)"
        raise UserError(f"{here}, and {reason}.") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{here}, and {page} has no revision {revision!r}.") from None
    except errors.HFValidationError as error:
        raise UserError(f"{here}, and not a name for the hub: {_line(error)}.") from None
    except Exception as error:  # Its HTTP client, the network and the cache's disk have their own.
        if constants.HF_HUB_OFFLINE:
            reason = f"HF_HUB_OFFLINE is set while {repo} is not whole in the cache; unset it once"
        else:
            cause = error.__cause__ or error
            reason = (
                f"{page} cannot be fetched ({type(cause).__name__}: {_line(cause)}); check the "
                "network, or give the path of a copy"
            )
        raise UserError(f"{here}, and {reason}.") from None


def _line(error: BaseException) -> str:
    """The first line of a message, without its last full stop."""
    return next(iter(str(error).strip().splitlines()), "no reason given").rstrip(". ")
