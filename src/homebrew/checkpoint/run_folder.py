"""The folder of a run: the lock that lets one process at a time write to it, and moving an earlier run aside."""

import contextlib
import fcntl
import os
import re
import socket
import time
from pathlib import Path

from homebrew.constants import RUN_FILES
from homebrew.errors import ConfigError
from homebrew.io import fsync_directory, make_directory, open_regular
from homebrew.user_warnings import warn

LOCK_FILE = "run.lock"

_HOLDER = re.compile(rb"(\d{1,20}) ([\w.-]{1,255})", re.ASCII)
_POLL_SECONDS = 0.01
_MAX_POLLS = 50


class RunLock:
    """Exclusive lock on the folder of a run.

    The kernel releases it when the process ends, however that happens: a killed run leaves no lock behind. The lock
    file itself stays in the folder, and says which process holds the lock. Locks also work between hosts, if the
    network file system supports them.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Create the folder and acquire the lock, or warn if the file system has no locks.

        Does nothing if this object already holds the lock.

        Raises:
            ConfigError: Another process, or another `RunLock` of this process, holds the lock; or the folder cannot be
                written to.
        """
        if self._descriptor is not None:
            return
        try:
            make_directory(self._folder)
            descriptor = open_regular(self._folder / LOCK_FILE, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            is_link = isinstance(error, FileExistsError) and Path(error.filename).is_symlink()
            reason = "a symbolic link to nothing" if is_link else error.strerror
            raise not_writable(self._folder, f"{error.filename}: {reason}") from error
        try:
            self._lock(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        _HELD.add(self)
        with contextlib.suppress(OSError):  # on a full disk, the lock is held but its holder is not recorded
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()} {socket.gethostname()}".encode())

    def release(self) -> None:
        """Release the lock. Does nothing if this object does not hold it."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, 0)
            self.close()

    def close(self) -> None:
        """Close the lock file: in the process that took the lock, this releases it."""
        if self._descriptor is not None:
            _HELD.discard(self)
            with contextlib.suppress(OSError):  # must not hide the error of a failed run
                os.close(self._descriptor)
            self._descriptor = None

    def _lock(self, descriptor: int) -> None:
        """Acquire the lock. Warn if the file system has no locks, and raise ConfigError if the lock is held."""
        holder = b""
        for _ in range(_MAX_POLLS):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):  # the latter from some network file systems
                if holder := os.pread(descriptor, 300, 0):
                    break
                time.sleep(_POLL_SECONDS)  # the holder is about to write its name, or to release the lock
            except OSError as error:
                warn(
                    f"The file system of output_dir={str(self._folder)!r} has no locks ({error.strerror}). Make sure "
                    f"that no other run uses this folder."
                )
                return
            else:
                return
        raise ConfigError(
            f"output_dir={str(self._folder)!r} is in use by {_describe(holder)}. Wait until that run has ended, or "
            f"choose another output_dir."
        )


def not_writable(folder: Path, reason: str) -> ConfigError:
    """Return the error for the folder of a run that cannot be written to."""
    return ConfigError(f"output_dir={str(folder)!r} cannot be written to: {reason}. Choose another folder.")


def move_run_aside(folder: Path) -> None:
    """Move an earlier run's files to a new folder `old-1`, `old-2`, … inside the run's folder, if there are any.

    Other files stay where they are. The caller holds the lock.

    Raises:
        ConfigError: A file could not be moved.
    """
    names = [name for name in RUN_FILES if os.path.lexists(folder / name)]
    if not names:
        return
    try:
        number = 1
        while os.path.lexists(aside := folder / f"old-{number}"):
            number += 1
        make_directory(aside)
        for name in names:
            (folder / name).rename(aside / name)
        fsync_directory(aside)
        fsync_directory(folder)
    except OSError as error:
        raise ConfigError(
            f"The run in output_dir={str(folder)!r} could not be moved aside: {error.filename}: {error.strerror}. "
            f"Choose another output_dir."
        ) from error


def _describe(holder: bytes) -> str:
    """Return who holds a lock, from the contents of the lock file."""
    match = _HOLDER.fullmatch(holder)
    if match is None:
        return "another process"
    pid, host = int(match[1]), match[2].decode()
    is_own = (pid, host) == (os.getpid(), socket.gethostname())
    return f"{'another Trainer of this process' if is_own else 'another process'} (process {pid} on host {host})"


_HELD: set[RunLock] = set()
"""The locks that this process holds."""


def _close_inherited() -> None:
    """Close the lock files in a forked child, such as a loader worker, which would otherwise keep the lock."""
    for lock in tuple(_HELD):
        lock.close()


os.register_at_fork(after_in_child=_close_inherited)
