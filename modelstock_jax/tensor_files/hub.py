"""Names of models: a path here, or a repository of Hugging Face's hub."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

from modelstock_jax.errors import UserError, listed
from modelstock_jax.tensor_files.reader import PICKLES

# A model without its pickles and code: tensors, configs, the tokenizer's files.
FILES = ("*.safetensors", "*.json", "*.txt", "*.model")
# Whatever is asked for: files that run code when they are opened.
NEVER = (*(f"*{suffix}" for suffix in PICKLES), "*.py")
# ORG/NAME or ORG/NAME@REVISION.
HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
# Models that had no organization in their names, and the one that they moved to.
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
# A name with an ending such as .safetensors is a file's.
_BARE = re.compile(r"[A-Za-z0-9](?:[\w-]|\.(?=\d)){0,95}")
_URL = re.compile(r"(?:\w+://)?(?P<host>[\w.-]+(?::\d+)?)/(?P<path>[^?#]*)(?:[?#].*)?")
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co", "hf-mirror.com")
_PAGES = ("tree", "blob", "resolve", "raw", "commit", "commits")


def resolve(
    name: str | os.PathLike[str], patterns: Sequence[str] = FILES, subfolders: Sequence[str] = ()
) -> Path:
    """The path that a model's name stands for, fetched from the hub where it is not here.

    A path that exists wins over a repository of the same spelling. From the hub come only the
    files of the repository's top folder and of `subfolders` that match `patterns`, never a pickle
    or code, into Hugging Face's own cache; with `HF_HUB_OFFLINE=1` that cache is all there is.

    Args:
      name: A path, or `ORG/NAME` or `ORG/NAME@REVISION` (a branch, tag or commit). An
          `os.PathLike` is only ever a path.
      patterns: Names of files to fetch, with `*` for anything.
      subfolders: Folders of the repository, such as `unet`; those that are not there are left
          out, and so are the folders in them.

    Returns:
      The path as it was given, or a directory of the cache.

    Raises:
      UserError: No such path, and no such repository or revision, a gated one, or no way to the
          hub; for a URL, a dataset or a bare name like `gpt2` with the name to give instead.

    Example:
      >>> resolve(".").is_dir()
      True
    """
    path = Path(name)
    if os.path.exists(path):
        return path
    shown = listed([os.fspath(name)])
    if not isinstance(name, str):
        raise UserError(f"{shown}: no such file or directory.")
    if (wrong := _misnamed(name)) is not None:
        raise UserError(f"{shown}: {wrong}.")
    if (match := HUB_ID.fullmatch(name)) is None:
        raise UserError(f"{shown}: no such file or directory.")
    if path.suffix in (*PICKLES, ".safetensors", ".json"):
        raise UserError(f"{shown}: no such file.")
    return _fetch(name, match["repo"], match["revision"], patterns, subfolders)


def _misnamed(name: str) -> str | None:
    """What is wrong with a name that is meant for the hub but is not ORG/NAME, or None."""
    address = _URL.fullmatch(name)
    endpoint = os.environ.get("HF_ENDPOINT", "").rpartition("//")[2].strip("/")
    if name.startswith("hf://"):
        address, where = None, name.removeprefix("hf://")
    elif address is not None and address["host"] in (*_HOSTS, endpoint):
        where = unquote(address["path"])
    elif re.match(r"\w+://", name):
        return "a URL; download the model and give the path of its directory"
    else:
        where = None
    parts = [part for part in (name if where is None else where).split("/") if part]
    if parts[:1] in (["datasets"], ["spaces"]) and (where is not None or len(parts) == 3):
        return f"a {parts[0][:-1]} of the Hugging Face hub, not a model; give a model as ORG/NAME"
    if where is not None:
        model = listed([_hub_name(parts)])
        return f"an address of the Hugging Face hub; give the model's name: {model}"
    if _BARE.fullmatch(name) or (HUB_ID.fullmatch(name.rstrip("/")) and name.endswith("/")):
        how = f"a model of the Hugging Face hub is written {_hub_name(parts)}"
        return f"no such file or directory; {how}"
    return None


def _hub_name(parts: Sequence[str]) -> str:
    """ORG/NAME@REVISION for the parts of an address or a bare name.

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
    # Half a second: only where the hub is asked.
    from huggingface_hub import constants, errors

    here = f"{name}: no such path here"
    page = f"{constants.ENDPOINT}/{repo}"
    try:
        path = _download(repo, revision, "", patterns)
        for folder in subfolders:  # Of the same commit: a branch may move meanwhile.
            _download(repo, path.name, f"{glob.escape(folder.strip('/'))}/", patterns)
        return path
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


def _download(repo: str, revision: str | None, folder: str, patterns: Sequence[str]) -> Path:
    """Fetches the files of one folder, not those of folders in it."""
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            repo,
            revision=revision,
            allow_patterns=[f"{folder}{pattern}" for pattern in patterns],
            # In the hub's patterns `*` matches `/`, too.
            ignore_patterns=[*NEVER, f"{folder}*/*"],
        )
    )


def _line(error: BaseException) -> str:
    """The first line of a message, without its last full stop."""
    return next(iter(str(error).strip().splitlines()), "no reason given").rstrip(". ")
