"""Files that are whole or not there, locks, and what can be written where."""

import errno
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.errors import UserError


def temporary(path: Path) -> Path:
    """Where the contents of a file lie until they are complete."""
    return path.with_name(path.name + ".tmp")


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Replace the file at `path` or leave it as it was: a reader never sees half of it, and once it
    is there it stays, whatever happens to the machine."""
    try:
        with temporary(path).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary(path), path)
    except BaseException:
        temporary(path).unlink(missing_ok=True)
        raise


def write_nowhere(path: Path, content: bytes | memoryview) -> None:
    """Find out whether there is room for `write_whole`: write as much into a file without a name on
    the same disk."""
    folder = next(x for x in path.absolute().parents if x.exists())
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(content)


def check_writable(folder: str | Path, option: str = "--save_path") -> None:
    """Raises UserError where `folder` cannot be made and written into; leaves nothing behind."""
    existing = Path(folder).absolute()
    try:
        while not os.path.lexists(existing):
            existing = existing.parent
        longest = max(len(os.fsencode(part)) for part in Path(folder).absolute().parts)
        if longest > os.pathconf(existing, "PC_NAME_MAX"):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write into {folder} ({error.strerror}): choose another {option}"
        ) from None


def digest(path: str | Path) -> str:
    """SHA-256 of a file, in hex."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from None


@contextmanager
def file_lock(target: Path) -> Iterator[None]:
    """Be the only process that makes `target`; others wait for it.

    The lock dies with its process, so what a killed one leaves is taken over. (The library filelock
    has none that says that it waits, and removes its file without letting two processes in.)
    """
    path = target.with_name(f".{target.name}.lock")
    while True:
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for the process that makes {target} ...", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
            if not (path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())):
                continue  # its owner has finished and removed it
            try:
                yield
            finally:
                path.unlink()
            return
