"""Work that several processes share: who claims a piece does it, and the others take the next."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from modelstock_jax.errors import UserError

Piece = TypeVar("Piece")

# Between two looks at what others are doing; a piece takes a second to days.
_SECONDS = 0.5


@contextlib.contextmanager
def claim(directory: Path, name: str, *, wait: bool = False) -> Iterator[bool]:
    """Whether the piece is this process's, until the block ends or the process does.

    A lock on DIRECTORY/NAME.lock; where a file system has none, every process is as if alone.

    Args:
      directory: made if missing; on a disk that the processes share.
      name: of the piece.
      wait: until whoever has it is done.

    Raises:
      UserError: if nothing can be written there.
    """
    path = directory / f"{name}.lock"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another workdir") from error
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass
        yield True
        # Whoever still comes to the old file finds the piece done.
        path.unlink(missing_ok=True)
    finally:
        os.close(file)


def turns(
    directory: Path,
    pieces: Mapping[str, Piece],
    done: Callable[[str], bool],
    waits: Callable[[int], None] = lambda count: None,
    after: Mapping[str, Collection[str]] | None = None,
) -> Iterator[Piece]:
    """The pieces that are not done and that no other process is at; ends when all are done.

    A piece is claimed until the next is asked for. What another process gave up is taken over.

    Args:
      directory: of the locks.
      pieces: by name, in the order in which they are done.
      done: name -> whether anyone has done it.
      waits: told of the number of pieces whenever only others', and what needs them, are left and
        it has changed.
      after: name -> the pieces that must be done before it.

    Example:
      >>> import tempfile
      >>> results = {"a": 1}
      >>> for piece in turns(Path(tempfile.mkdtemp()), {"a": "a", "b": "b"}, results.__contains__):
      ...     results[piece] = 2
      >>> results
      {'a': 1, 'b': 2}
    """
    left, told, after = dict(pieces), 0, after or {}
    while left:
        found = False
        for name in list(left):
            if any(needed in left for needed in after.get(name, ())):
                continue
            with claim(directory, name) as ours:
                if ours and not done(name):
                    found = True
                    yield left[name]
                if ours:
                    del left[name]
        if left and not found:
            if len(left) != told:
                waits(len(left))
                told = len(left)
            time.sleep(_SECONDS)
