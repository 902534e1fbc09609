"""Resolve a model name to a local path or a Hugging Face hub repository."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

from modelstock_jax.errors import UserError, listed
from modelstock_jax.tensor_files.reader import PICKLES

# The files of a model without pickles and code: tensors, configs and tokenizer files.
FILES = ("*.safetensors", "*.json", "*.txt", "*.model")
# Never fetched, whatever the patterns: files that can run code when they are opened.
NEVER = (*(f"*{suffix}" for suffix in PICKLES), "*.py")
# ORG/NAME or ORG/NAME@REVISION.
HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
# Models whose old names had no organization, by the organization that they moved to.
_MOVED = {
    "FacebookAI": "roberta-base roberta-large xlm-roberta-base xlm-roberta-large",
    "albert": "albert-base-v1 albert-base-v2 albert-large-v2",
    "distilbert": "distilbert-base-cased distilbert-base-uncased distilgpt2 distilroberta-base",
    "google-bert": "bert-base-cased bert-base-chinese bert-base-multilingual-cased "
    "bert-base-uncased bert-large-cased bert-large-uncased",
    "google-t5": "t5-small t5-base t5-large t5-3b t5-11b",
    "openai-community": "gpt2 gpt2-medium gpt2-large gpt2-xl openai-gpt",
    "xlnet": "xlnet-base-cased xlnet-large-cased",
}
_ORGANIZATION = {name: org for org, names in _MOVED.items() for name in names.split()}
# A name with an extension such as .safetensors is a file name.
_BARE = re.compile(r"[A-Za-z0-9](?:[\w-]|\.(?=\d)){0,95}")
_URL = re.compile(r"(?:\w+://)?(?P<host>[\w.-]+(?::\d+)?)/(?P<path>[^?#]*)(?:[?#].*)?")
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co", "hf-mirror.com")
_PAGES = ("tree", "blob", "resolve", "raw", "commit", "commits")


def resolve(
    name: str | os.PathLike[str], patterns: Sequence[str] = FILES, subfolders: Sequence[str] = ()
) -> Path:
    """Return the path of a model; fetch it from the hub if it is not a local path.

    An existing path takes precedence over a repository of the same name. Only files that match
    `patterns` in the top folder of the repository and in `subfolders` are fetched, never a pickle
    or code. They are stored in Hugging Face's own cache. With `HF_HUB_OFFLINE=1` only that cache
    is used.

    Args:
      name: a path, or `ORG/NAME` or `ORG/NAME@REVISION` (a branch, tag or commit). An
        `os.PathLike` is always a path.
      patterns: names of the files to fetch; `*` matches any characters
      subfolders: folders of the repository, such as `unet`. Folders that do not exist are skipped,
        and so are the folders inside `subfolders`.

    Returns:
      the given path, or a directory of the cache

    Raises:
      UserError: the path does not exist, and the repository or revision does not exist or is gated,
        or the hub cannot be reached. For a URL, a dataset or a bare name like `gpt2`, the message
        has the name to pass instead.

    Example:
      >>> resolve(".").is_dir()
      True
    """
    path = Path(name)
    if os.path.exists(path):
        return path
    shown = listed([os.fspath(name)])
    if not isinstance(name, str):
        raise UserError(f"{shown}: no such file or directory")
    if (problem := _name_problem(name)) is not None:
        raise UserError(f"{shown}: {problem}")
    if (match := HUB_ID.fullmatch(name)) is None:
        raise UserError(f"{shown}: no such file or directory")
    if path.suffix in (*PICKLES, ".safetensors", ".json"):
        raise UserError(f"{shown}: no such file")
    return _fetch(name, match["repo"], match["revision"], patterns, subfolders)


def _name_problem(name: str) -> str | None:
    """Return what is wrong with a name that is meant for the hub but is not ORG/NAME, or None."""
    address = _URL.fullmatch(name)
    endpoint = os.environ.get("HF_ENDPOINT", "").rpartition("//")[2].strip("/")
    if name.startswith("hf://"):
        address, hub_path = None, name.removeprefix("hf://")
    elif address is not None and address["host"] in (*_HOSTS, endpoint):
        hub_path = unquote(address["path"])
    elif re.match(r"\w+://", name):
        return "a URL; download the model and pass the path of its directory"
    else:
        hub_path = None
    parts = [part for part in (name if hub_path is None else hub_path).split("/") if part]
    if parts[:1] in (["datasets"], ["spaces"]) and (hub_path is not None or len(parts) == 3):
        return f"a {parts[0][:-1]} of the Hugging Face hub, not a model; pass a model as ORG/NAME"
    if hub_path is not None:
        model = listed([_hub_name(parts)])
        return f"an address of the Hugging Face hub; pass the name of the model: {model}"
    if _BARE.fullmatch(name) or (HUB_ID.fullmatch(name.rstrip("/")) and name.endswith("/")):
        return f"no such file or directory; for a Hugging Face hub model pass {_hub_name(parts)}"
    return None


def _hub_name(parts: Sequence[str]) -> str:
    """Return ORG/NAME@REVISION for the parts of an address or a bare name.

    Example:
      >>> _hub_name(["org", "name", "tree", "v1", "unet"]), _hub_name(["gpt2", "tree", "main"])
      ('org/name@v1', 'openai-community/gpt2')
    """
    bare = len(parts) < 2 or parts[1] in _PAGES
    name, rest = "/".join(parts[: 1 if bare else 2]), parts[1 if bare else 2 :]
    if bare:
        name = f"{_ORGANIZATION[name]}/{name}" if name in _ORGANIZATION else "ORG/NAME"
    if len(rest) < 2 or rest[0] not in _PAGES or rest[1] == "main" or name == "ORG/NAME":
        return name
    return f"{name}@{'/'.join(rest[1:4] if rest[1] == 'refs' else rest[1:2])}"


def _fetch(
    name: str, repo: str, revision: str | None, patterns: Sequence[str], subfolders: Sequence[str]
) -> Path:
    # Importing it takes half a second, so only if the hub is needed.
    from huggingface_hub import constants, errors

    no_path = f"{name}: no such local path"
    page = f"{constants.ENDPOINT}/{repo}"
    try:
        path = _download(repo, revision, "", patterns)
        # Fetch the folders at the same commit: a branch can change in between.
        for folder in subfolders:
            _download(repo, path.name, f"{glob.escape(folder.strip('/'))}/", patterns)
        return path
    except errors.GatedRepoError:  # a subclass of RepositoryNotFoundError
        reason = f"{repo} is gated: accept its terms at {page}, then run `hf auth login`"
        raise UserError(f"{no_path}, and {reason}") from None
    except errors.RepositoryNotFoundError:
        reason = f"no repository {page} (a private one requires `hf auth login`)"
        raise UserError(f"{no_path}, and {reason}") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{no_path}, and {page} has no revision {revision!r}") from None
    except errors.HFValidationError as error:
        raise UserError(f"{no_path}, and not a valid hub name: {_first_line(error)}") from None
    except Exception as error:  # The HTTP client, the network and the disk raise their own errors.
        if constants.HF_HUB_OFFLINE:
            reason = (
                f"HF_HUB_OFFLINE is set, but {repo} is not completely in the cache; unset it to "
                "download the model"
            )
        else:
            cause = error.__cause__ or error
            reason = (
                f"{page} cannot be fetched ({type(cause).__name__}: {_first_line(cause)}); check "
                "the network, or pass the path of a copy"
            )
        raise UserError(f"{no_path}, and {reason}") from None


def _download(repo: str, revision: str | None, folder: str, patterns: Sequence[str]) -> Path:
    """Fetch the files of one folder, without its subfolders."""
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            repo,
            revision=revision,
            allow_patterns=[f"{folder}{pattern}" for pattern in patterns],
            # In the hub's patterns `*` also matches `/`.
            ignore_patterns=[*NEVER, f"{folder}*/*"],
        )
    )


def _first_line(error: BaseException) -> str:
    """Return the first line of a message, without the final full stop."""
    return next(iter(str(error).strip().splitlines()), "no reason given").rstrip(". ")
