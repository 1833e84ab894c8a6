"""Files that are whole or not there, locks, and what can be written where."""

import errno
import hashlib
import os
import stat
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout  # torch depends on it

from runtime.errors import UserError

try:
    import fcntl
except ImportError:  # no Unix: the locks below are filelock's
    fcntl = None


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


def must_be_file(path: str | Path) -> None:
    """Raises OSError where it is none: reading a pipe or a device may never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "it is no file")


def check_writable(folder: str | Path, option: str = "--save_path") -> None:
    """Raises UserError where `folder` cannot be made and written into; leaves nothing behind."""
    existing = Path(folder).absolute()
    try:
        while not os.path.lexists(existing):
            existing = existing.parent
        longest = max(len(os.fsencode(part)) for part in Path(folder).absolute().parts)
        if hasattr(os, "pathconf") and longest > os.pathconf(existing, "PC_NAME_MAX"):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write into {folder} ({error.strerror}): choose another {option}"
        ) from None


def write_files(
    folder: str | Path,
    contents: Mapping[str, str | bytes],
    option: str = "--out",
    instead_of: Iterable[str] = (),
) -> None:
    """Write files into `folder`, all of them or none.

    Each is written beside its target and moved there once all are complete. What of `instead_of` is
    not among them is of an earlier run, and goes. Raises UserError where the folder cannot be made
    or written to.
    """
    if not str(folder):
        raise UserError(f"{option} names no folder")
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    complete: dict[Path, Path] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            target = folder / name
            if target.is_dir():  # found out now, not after its neighbours have been replaced
                raise IsADirectoryError(errno.EISDIR, f"{name} is a folder there")
            temporary = folder / f".{name}.{os.getpid()}"
            complete[temporary] = target
            content = content.encode() if isinstance(content, str) else content
            temporary.write_bytes(content)
        for temporary, target in complete.items():
            os.replace(temporary, target)
        for name in set(instead_of) - set(contents):
            (folder / name).unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        for temporary in complete:
            temporary.unlink(missing_ok=True)
        for path in made:
            with suppress(OSError, ValueError):
                path.rmdir()
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"cannot write into {str(folder)!r} ({reason}): choose another {option}"
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
    waiting = f"waiting for the process that makes {target} ..."
    if fcntl is None:
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(waiting, flush=True)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()
        return
    while True:
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(waiting, flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
            if not is_still_at(path, file):
                continue  # its owner has finished and removed it
            try:
                yield
            finally:
                path.unlink()
            return


def is_still_at(path: Path, file: IO) -> bool:
    """Whether what lies at the path is this open file, neither removed nor replaced by another
    process."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def lock_open(file: IO) -> Callable[[], None]:
    """Lock an open file for this process, until what is returned closes it or the process ends,
    however it ends.

    A record lock: a loader's workers do not inherit it, and it also works over NFS. Raises
    BlockingIOError where another process has it, other OSErrors on a file system without locks.
    """
    if fcntl is None:
        lock = _beside(file.name)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise BlockingIOError(errno.EAGAIN, "another process has it") from None
        return lambda: (file.close(), lock.release())
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except PermissionError:  # what some systems say
        raise BlockingIOError(errno.EAGAIN, "another process has it") from None
    return file.close


def is_locked_open(path: Path) -> bool:
    """Whether another process has locked the file by `lock_open`, asked without disturbing it.
    Raises OSError where there is no file, or no locks."""
    with path.open("rb") as file:
        if fcntl is None:
            try:
                with _beside(path).acquire(timeout=0):
                    return False
            except Timeout:
                return True
        flock = "hhqqi"  # of Linux: type, whence, start, length, process
        question = struct.pack(flock, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        answer = fcntl.fcntl(file, fcntl.F_GETLK, question)
    return struct.unpack(flock, answer)[0] != fcntl.F_UNLCK


@contextmanager
def writing_alone(file: int, path: Path) -> Iterator[None]:
    """Wait until no other process is in here with the open file; it is unlocked when it is closed.
    On a file system without locks there is none."""
    if fcntl is None:
        with _beside(path):
            yield
        return
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX)
    yield


def _beside(path: str | Path) -> FileLock:
    """A lock that is a file of its own: on Windows one that is locked cannot be read."""
    return FileLock(f"{path}.held")
