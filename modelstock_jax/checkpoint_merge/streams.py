"""Standard output and error of a command: closed, full or not UTF-8, they never end a merge."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class Stream:
    r"""A text stream whose write errors are kept in `error`, not raised.

    Characters that its encoding lacks are written as escapes. Everything else is the stream's own.

    Args:
      stream: the stream, or None where it was closed before this process began.

    Example:
      >>> stream = Stream(io.TextIOWrapper(io.BytesIO(), "ascii"))
      >>> _ = stream.write("1–2"); stream.flush(); stream.buffer.getvalue()
      b'1\\u20132'
    """

    def __init__(self, stream: TextIO | None):
        self._stream = io.StringIO() if stream is None else stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """Writes text, or nothing after an error."""
        if self.error is None:
            try:
                self._stream.write(self._encodable(text))
            except OSError as error:
                self._fail(error)
        return len(text)

    def flush(self) -> None:
        """Flushes what was written, or nothing after an error."""
        if self.error is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._fail(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _encodable(self, text: str) -> str:
        encoding = self._stream.encoding or "utf-8"
        try:
            text.encode(encoding, self._stream.errors or "strict")
        except UnicodeEncodeError:
            return text.encode(encoding, "backslashreplace").decode(encoding)
        return text

    def _fail(self, error: OSError) -> None:
        self.error = error
        # What is still buffered would fail again when Python exits, which changes its status.
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)


@contextlib.contextmanager
def guarded() -> Iterator[tuple[Stream, Stream]]:
    """Replaces standard output and error by `Stream`s while the block runs.

    Yields:
      Output and error.
    """
    # The next file to be opened would get the number of a closed one: a library's message on
    # standard error would be written into a model.
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # It gets the lowest free number.
    output, errors = Stream(sys.stdout), Stream(sys.stderr)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):  # type: ignore
        try:
            yield output, errors
        finally:
            output.flush()
            errors.flush()
