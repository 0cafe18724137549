"""An arena as a file in POSIX shared memory.

Not `multiprocessing.shared_memory`: there, an attacher that exits deletes the owner's segment.
The file is opened with O_EXCL and O_NOFOLLOW, mode 0600, reserved with posix_fallocate (a file that is merely
truncated to size ends in SIGBUS when memory runs out), prefaulted, and held by a lock for as long as its owner lives.
Consumers map it read-only.
"""

import contextlib
import fcntl
import mmap
import os
import secrets
import stat
import struct
import threading
import time
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from mosel.errors import ConfigError, Overloaded, PayloadTooLarge, ReadNotProven
from mosel.transport.layout import HEADER_BYTES, MAX_SLOTS, MIB, SLOT_SIZES, Layout
from mosel.transport.slots import Slot, SlotStatistics, SlotTable

_MAGIC = b"MOSELARN"
_VERSION = 1
_HEADER = struct.Struct(f"<8sI4xQQ{len(SLOT_SIZES)}I")
_PREFIX = "mosel-arena-"


class Arena:
    """The producer's side: owns the file, fills slots, takes them back. Thread-safe; a context manager.

    Args:
        directory: where shared memory is mounted, /dev/shm.
        nbytes: the budget in bytes.
        setting: the setting that states the budget, for messages.

    Raises:
        ConfigError: the directory does not hold that much; gives the numbers and the setting.
    """

    def __init__(self, directory: Path, nbytes: int, setting: str) -> None:
        self.arena_id, self.epoch = secrets.randbits(64), secrets.randbits(64)
        self.layout = Layout.for_budget(nbytes)
        self._setting = setting
        self._table = SlotTable(self.layout)
        self._lock = threading.Lock()
        self._path = _path(directory, self.arena_id, self.epoch)
        self._fd = _create(self._path, self.layout.total_bytes, setting)
        self._map = mmap.mmap(self._fd, self.layout.total_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self._map[: _HEADER.size] = _HEADER.pack(_MAGIC, _VERSION, self.arena_id, self.epoch, *self.layout.counts)
        self._control = np.frombuffer(self._map, np.uint64, self.layout.slot_count, HEADER_BYTES)

    @property
    def largest_slot(self) -> int:
        """Bytes of the largest slot."""
        return max(size for size, count in zip(SLOT_SIZES, self.layout.counts, strict=True) if count)

    def write(self, data: memoryview, expires_at: float) -> Slot:
        """Copies bytes into a slot and publishes it.

        Args:
            data: contiguous bytes.
            expires_at: end of the lease, seconds on the monotonic clock.

        Raises:
            PayloadTooLarge: no slot of this arena is that large.
            Overloaded: every slot that fits is in use.
        """
        if data.nbytes > self.largest_slot:
            raise PayloadTooLarge(
                f"a tensor of {data.nbytes} bytes is larger than the largest slot, {self.largest_slot} bytes; "
                f"send fewer items or raise {self._setting}"
            )
        with self._lock:
            slot = self._table.acquire(data.nbytes, time.monotonic())
            if slot is None:
                raise Overloaded(f"shared memory is full ({self.layout.total_bytes // MIB} MiB, {self._setting})")
            # Before the first byte, so that a reader of an older generation finds out.
            self._control[slot.index] = slot.generation
        try:
            self._map[slot.offset : slot.offset + data.nbytes] = data.cast("B")
        except BaseException:
            with self._lock:
                self._table.abort(slot)
            raise
        with self._lock:
            self._table.publish(slot, expires_at)
        return slot

    def release(self, index: int, generation: int) -> bool:
        """Ends a lease early; False if there is no such lease."""
        with self._lock:
            return self._table.release(index, generation)

    def statistics(self) -> SlotStatistics:
        """Slots by state, after taking back expired leases."""
        with self._lock:
            self._table.expire(time.monotonic())
            return self._table.statistics()

    def close(self) -> None:
        """Removes the file; consumers that mapped it keep their mapping until they drop it."""
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        if self._fd >= 0:
            self._control = np.empty(0, np.uint64)
            self._map.close()
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> "Arena":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ArenaView:
    """The consumer's side: a read-only map of somebody else's arena.

    Raises:
        ReadNotProven: the file is not there, or is not the arena that was named.
    """

    def __init__(self, directory: Path, arena_id: int, epoch: int) -> None:
        self._path = _path(directory, arena_id, epoch)
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            raise ReadNotProven("the arena that the ref names is not there") from None
        try:
            self.layout = _checked_layout(fd, arena_id, epoch)
            self._map = mmap.mmap(fd, self.layout.total_bytes, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        self._control = np.frombuffer(self._map, np.uint64, self.layout.slot_count, HEADER_BYTES)

    def bytes_of(self, slot: int, nbytes: int) -> NDArray[np.uint8]:
        """The first `nbytes` bytes of a slot, not copied; call `prove` after copying them."""
        if not (0 <= slot < self.layout.slot_count and 0 <= nbytes <= self.layout.slot_size(slot)):
            raise ReadNotProven("the ref names a slot that the arena does not have")
        return np.frombuffer(self._map, np.uint8, nbytes, self.layout.slot_offset(slot))

    def prove(self, slot: int, generation: int) -> None:
        """Checks that the slot has not been acquired again.

        Raises:
            ReadNotProven: it has; what was read is worthless.
        """
        # No slot is ever published with generation 0.
        if generation == 0 or int(self._control[slot]) != generation:
            raise ReadNotProven("the slot was reused while it was read")

    def is_gone(self) -> bool:
        """Whether the producer has removed its arena."""
        return not self._path.exists()

    def close(self) -> None:
        """Unmaps the arena."""
        self._control = np.empty(0, np.uint64)
        self._map.close()


def remove_orphans(directory: Path) -> int:
    """Removes arenas whose owners died without doing so, and only those; returns how many."""
    removed = 0
    for path in directory.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                # The lock is free only if no process holds the file open as its arena.
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                removed += 1
            finally:
                os.close(fd)
    return removed


def _path(directory: Path, arena_id: int, epoch: int) -> Path:
    return directory / f"{_PREFIX}{arena_id:016x}-{epoch:016x}"


def _create(path: Path, nbytes: int, setting: str) -> int:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"transport.shm_dir: cannot create {path}: {error.strerror}") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.posix_fallocate(fd, 0, nbytes)
        if os.fstat(fd).st_nlink == 0:
            raise ConfigError(f"{path} was removed while it was made; start again")
    except OSError as error:
        free = os.statvfs(path.parent)
        path.unlink(missing_ok=True)
        os.close(fd)
        raise ConfigError(
            f"{path.parent} has {free.f_bavail * free.f_frsize // MIB} MiB free, {setting} asks for "
            f"{nbytes // MIB} MiB ({error.strerror}); lower {setting}, or give containers more shared memory "
            "(shm_size in compose)"
        ) from None
    except ConfigError:
        os.close(fd)
        raise
    return fd


def _checked_layout(fd: int, arena_id: int, epoch: int) -> Layout:
    status = os.fstat(fd)
    sound = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and status.st_mode & 0o077 == 0
    header = os.pread(fd, _HEADER.size, 0) if sound else b""
    if len(header) != _HEADER.size:
        raise ReadNotProven("the file that the ref names is not an arena of this user")
    magic, version, its_id, its_epoch, *counts = _HEADER.unpack(header)
    layout = Layout(tuple(counts))
    if (magic, version, its_id, its_epoch) != (_MAGIC, _VERSION, arena_id, epoch) or layout.slot_count > MAX_SLOTS:
        raise ReadNotProven("the file that the ref names is not that arena")
    if layout.total_bytes != status.st_size:
        raise ReadNotProven("the arena's file does not have the size of its layout")
    return layout
