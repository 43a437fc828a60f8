"""Writing files so that a failure leaves nothing half-written."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file beside its place, then rename it into place.

    The body writes to the path that the context gives. If it raises, that file is removed and ``path`` stays as it
    was. Nested contexts write several files together: none is renamed before all bodies have run. A symbolic link
    is followed, so the file that it points to is replaced.

    Args:
        path: file to write; its folder must exist.

    Raises:
        OSError: the file cannot be written; ``filename`` is ``path``.

    Example:
        >>> with replacing("model.c") as temporary:  # doctest: +SKIP
        ...     temporary.write_text("int x;")
    """
    target = Path(os.path.realpath(path))
    # Found out here, so that of several files none is renamed before the last one fails.
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    # Not tempfile: it would leave the file readable by its owner only, whatever the umask says.
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.touch(exist_ok=False)
    except OSError as reason:
        raise type(reason)(reason.errno, reason.strerror, str(path)) from None
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
