"""Standard output and standard error of the commands: write errors do not stop a merge."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class Stream:
    r"""Text stream that stores write errors in `error` instead of raising them.

    A merge must not fail because standard output is closed, full or not UTF-8. Characters that the
    encoding lacks are written as escapes. All other attributes are those of the wrapped stream.

    Args:
      stream: the stream; None if it was closed before this process started

    Example:
      >>> stream = Stream(io.TextIOWrapper(io.BytesIO(), "ascii"))
      >>> _ = stream.write("1–2"); stream.flush(); stream.buffer.getvalue()
      b'1\\u20132'
    """

    def __init__(self, stream: TextIO | None):
        self._stream = io.StringIO() if stream is None else stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """Write text; after an error do nothing."""
        if self.error is None:
            try:
                self._stream.write(self._encodable(text))
            except OSError as error:
                self._fail(error)
        return len(text)

    def flush(self) -> None:
        """Flush the stream; after an error do nothing."""
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
        # Python flushes the buffer again at exit; another failure would change the exit status.
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)


@contextlib.contextmanager
def guarded() -> Iterator[tuple[Stream, Stream]]:
    """Replace standard output and standard error by `Stream`s inside the block.

    Yields:
      Standard output and standard error.
    """
    # The next file that is opened would get the descriptor of a closed stream, and a library's
    # message on standard error would be written into a model.
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # Returns the lowest free descriptor.
    output, errors = Stream(sys.stdout), Stream(sys.stderr)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):  # type: ignore
        try:
            yield output, errors
        finally:
            output.flush()
            errors.flush()
