"""The control file of an arena in POSIX shared memory: header, nonce, and per slot a generation and a size.

Not `multiprocessing.shared_memory`: there, an attacher that exits deletes the owner's segment. The file is opened with
O_EXCL and O_NOFOLLOW, mode 0600, reserved with posix_fallocate (a file that is merely truncated to size ends in SIGBUS
when memory runs out), prefaulted, and locked for as long as its owner lives. Consumers map it read-only.
"""

import contextlib
import fcntl
import mmap
import os
import secrets
import stat
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mosel.errors import ConfigError, ReadNotProven
from mosel.runtime import leftovers
from mosel.transport.host import monotonic_ns
from mosel.transport.layout import HEADER_BYTES, MAX_SLOTS, MIB, SLOT_SIZES, Layout

NONCE_BYTES = 16
# A read must be over so long before its lease: reader and producer read the clock at different moments.
PROOF_MARGIN_NS = 5_000_000
_MAGIC = b"MOSELARN"
_VERSION = 3
_HEADER = struct.Struct(f"<8sI?3xQQ{len(SLOT_SIZES)}I{NONCE_BYTES}s")
_PREFIX = "mosel-arena-"
_ATTEMPTS = 3
_GENERATION, _NBYTES = 0, 1
_NO_ENTRIES = np.empty((0, 2), np.uint64)


class ControlFile:
    """The producer's side.

    Args:
        directory: where shared memory is mounted, /dev/shm.
        layout: the arena's.
        holds_slots: whether the slots themselves follow in the file, or are somewhere else, in device memory.
        setting: the setting that states the arena's size, for messages.

    Raises:
        ConfigError: the directory does not hold that much; gives the numbers and the setting.
    """

    def __init__(self, directory: Path, layout: Layout, holds_slots: bool, setting: str) -> None:
        self.arena_id, self.epoch = secrets.randbits(64), secrets.randbits(64)
        self.nonce = secrets.token_bytes(NONCE_BYTES)
        nbytes = layout.total_bytes if holds_slots else layout.data_start
        self._path, self._fd = _create(directory, self.arena_id, self.epoch, nbytes, setting)
        leftovers.made(self._path)
        self.map = mmap.mmap(self._fd, nbytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        # Where the slots are elsewhere, the nonce is too: it proves the path to them.
        nonce = self.nonce if holds_slots else bytes(NONCE_BYTES)
        header = (_MAGIC, _VERSION, holds_slots, self.arena_id, self.epoch, *layout.counts, nonce)
        self.map[: _HEADER.size] = _HEADER.pack(*header)
        self._entries = _entries(self.map, layout)

    def claim(self, slot: int, generation: int, nbytes: int) -> None:
        """Tells readers that a slot is filled anew, and how far; to be called before its first byte is written."""
        self._entries[slot, _NBYTES], self._entries[slot, _GENERATION] = nbytes, generation

    def size_of(self, slot: int) -> int:
        """Bytes of the tensor that a slot was filled with last."""
        return int(self._entries[slot, _NBYTES])

    def close(self) -> None:
        """Removes the file; consumers that mapped it keep their mapping until they drop it."""
        leftovers.remove(self._path)
        if self._fd >= 0:
            self._entries = _NO_ENTRIES
            self.map.close()
            os.close(self._fd)
            self._fd = -1


class ControlView:
    """The consumer's side: somebody else's control file, mapped read-only.

    Raises:
        ReadNotProven: the file is not there, or is not the control file of the arena that was named.
    """

    def __init__(self, directory: Path, arena_id: int, epoch: int) -> None:
        self._path = _path(directory, arena_id, epoch)
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            raise ReadNotProven("the arena is not there") from None
        try:
            self.layout, self.holds_slots, self.nonce = _checked_header(fd, arena_id, epoch)
            self.map = mmap.mmap(fd, os.fstat(fd).st_size, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        self._entries = _entries(self.map, self.layout)

    def is_gone(self) -> bool:
        """Whether the producer, or the janitor after it, has removed the file."""
        return not self._path.exists()

    def check_bounds(self, slot: int, nbytes: int) -> None:
        """Raises ReadNotProven unless the arena has such a slot and it holds a tensor of so many bytes."""
        if not (0 <= slot < self.layout.slot_count and 0 <= nbytes <= self.layout.slot_size(slot)):
            raise ReadNotProven("the ref names a slot that the arena does not have")
        # Bytes behind the tensor are left of an older one.
        if int(self._entries[slot, _NBYTES]) != nbytes:
            raise ReadNotProven("the slot holds a tensor of another size: the ref is wrong, or the slot was reused")

    def prove(self, slot: int, generation: int, lease_expires_ns: int) -> None:
        """Checks that what was copied from a slot is what the ref means; to be called when the copy is complete.

        The clock is the proof: before its lease is over, a slot is reused only after the selector released it, and the
        selector releases nothing that is still read. The generation is a second check.

        Raises:
            ReadNotProven: what was read is worthless.
        """
        # No slot is ever published with generation 0.
        if generation == 0 or int(self._entries[slot, _GENERATION]) != generation:
            raise ReadNotProven("the slot was reused while it was read")
        check_lease(lease_expires_ns)

    def close(self) -> None:
        """Unmaps the file."""
        self._entries = _NO_ENTRIES
        self.map.close()


def check_lease(expires_ns: int) -> None:
    """Raises ReadNotProven unless a lease lasts long enough for a read that ends now."""
    if monotonic_ns() >= expires_ns - PROOF_MARGIN_NS:
        raise ReadNotProven("the lease of the slot was over before it was read")


def remove_orphans(directory: Path) -> int:
    """Removes control files whose owners died without doing so, and only those; returns how many."""
    removed = 0
    for path in directory.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                # The lock is free only if no process holds the file open as its arena.
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Another janitor may have been faster, and the name may be a new file's by now.
                if os.fstat(fd).st_nlink:
                    path.unlink()
                    removed += 1
            finally:
                os.close(fd)
    return removed


def _entries(control: mmap.mmap, layout: Layout) -> NDArray[np.uint64]:
    return np.frombuffer(control, np.uint64, 2 * layout.slot_count, HEADER_BYTES).reshape(-1, 2)


def _path(directory: Path, arena_id: int, epoch: int) -> Path:
    return directory / f"{_PREFIX}{arena_id:016x}-{epoch:016x}"


def _create(directory: Path, arena_id: int, epoch: int, nbytes: int, setting: str) -> tuple[Path, int]:
    path = _path(directory, arena_id, epoch)
    for _ in range(_ATTEMPTS):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"transport.shm_dir: cannot create {path}: {error.strerror}") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if os.fstat(fd).st_nlink:
                _reserve(fd, path, nbytes, setting)
                return path, fd
        except BaseException:
            path.unlink(missing_ok=True)
            os.close(fd)
            raise
        # Somebody took the new file for an orphan before it was locked.
        os.close(fd)
    raise ConfigError(f"transport.shm_dir: {path} was removed {_ATTEMPTS} times while it was made")


def _reserve(fd: int, path: Path, nbytes: int, setting: str) -> None:
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        free = os.statvfs(path.parent)
        raise ConfigError(
            f"{path.parent} has {free.f_bavail * free.f_frsize // MIB} MiB free, {setting} asks for "
            f"{nbytes // MIB} MiB ({error.strerror}); lower {setting}, or give containers more shared memory "
            "(shm_size in compose)"
        ) from None


def _checked_header(fd: int, arena_id: int, epoch: int) -> tuple[Layout, bool, bytes]:
    status = os.fstat(fd)
    sound = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and status.st_mode & 0o077 == 0
    header = os.pread(fd, _HEADER.size, 0) if sound else b""
    if len(header) != _HEADER.size:
        raise ReadNotProven("the arena's control file is not one of this user")
    magic, version, holds_slots, its_id, its_epoch, *counts, nonce = _HEADER.unpack(header)
    layout = Layout(tuple(counts))
    if (magic, version, its_id, its_epoch) != (_MAGIC, _VERSION, arena_id, epoch) or layout.slot_count > MAX_SLOTS:
        raise ReadNotProven("the control file is not that of the arena")
    if status.st_size != (layout.total_bytes if holds_slots else layout.data_start):
        raise ReadNotProven("the control file does not have the size of its layout")
    return layout, holds_slots, nonce
