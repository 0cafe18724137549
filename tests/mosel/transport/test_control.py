"""The control file: who may map it, what proves a read, and who removes it."""

import fcntl
import os
import secrets
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from mosel.errors import ConfigError, ReadNotProven
from mosel.transport import control
from mosel.transport.control import NONCE_BYTES, PROOF_MARGIN_NS, ControlFile, ControlView, remove_orphans
from mosel.transport.layout import KIB, MIB, Layout
from tests.mosel.transport.support import SETTING

ROOT = Path(__file__).parents[3]
LAYOUT = Layout((6, 2, 0, 0, 0, 0))
FOREVER_NS = 2**63
ARENA_ID, EPOCH = 1, 2


def only_file(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


def name_of(arena_id: int, epoch: int) -> str:
    return f"mosel-arena-{arena_id:016x}-{epoch:016x}"


@pytest.fixture
def file(shm: Path) -> Iterator[ControlFile]:
    file = ControlFile(shm, LAYOUT, True, SETTING)
    yield file
    file.close()


@pytest.fixture
def view(shm: Path, file: ControlFile) -> Iterator[ControlView]:
    view = ControlView(shm, file.arena_id, file.epoch)
    yield view
    view.close()


@pytest.mark.parametrize("holds_slots", [True, False])
def test_the_file_is_reserved_and_for_its_owner_alone(shm: Path, holds_slots: bool) -> None:
    file = ControlFile(shm, LAYOUT, holds_slots, SETTING)
    status = only_file(shm).stat()
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_size == (LAYOUT.total_bytes if holds_slots else LAYOUT.data_start)
    assert status.st_blocks * 512 >= status.st_size
    view = ControlView(shm, file.arena_id, file.epoch)
    assert (view.layout, view.holds_slots) == (LAYOUT, holds_slots)
    view.close()
    file.close()


def test_the_nonce_is_where_the_slots_are(shm: Path) -> None:
    for holds_slots in (True, False):
        file = ControlFile(shm, LAYOUT, holds_slots, SETTING)
        view = ControlView(shm, file.arena_id, file.epoch)
        assert view.nonce == (file.nonce if holds_slots else bytes(NONCE_BYTES))
        assert (file.nonce in only_file(shm).read_bytes()) is holds_slots
        view.close()
        file.close()


def test_a_file_that_is_there_already_is_never_taken_over(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "randbits", lambda _: 7)
    first = ControlFile(shm, LAYOUT, True, SETTING)
    first.claim(3, 9, 1)
    with pytest.raises(ConfigError, match=r"transport\.shm_dir: cannot create .*File exists"):
        ControlFile(shm, LAYOUT, True, SETTING)
    view = ControlView(shm, 7, 7)
    view.prove(3, 9, FOREVER_NS)
    view.close()
    first.close()


def test_a_link_in_the_way_is_not_followed(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "randbits", lambda _: 7)
    target = shm / "target"
    (shm / name_of(7, 7)).symlink_to(target)
    with pytest.raises(ConfigError, match="cannot create"):
        ControlFile(shm, LAYOUT, True, SETTING)
    assert not target.exists()
    target.write_bytes(b"x")
    with pytest.raises(ReadNotProven):
        ControlView(shm, 7, 7)


def test_a_consumer_cannot_write(view: ControlView) -> None:
    with pytest.raises(TypeError):
        view.map[0] = 1


def test_a_closed_file_leaves_nothing_and_its_readers_keep_their_map(shm: Path) -> None:
    file = ControlFile(shm, LAYOUT, True, SETTING)
    file.claim(2, 5, 1)
    view = ControlView(shm, file.arena_id, file.epoch)
    file.close()
    assert list(shm.iterdir()) == []
    file.close()
    view.prove(2, 5, FOREVER_NS)
    view.close()


def test_one_too_large_for_the_filesystem_gives_the_numbers_and_leaves_nothing(shm: Path) -> None:
    filesystem = os.statvfs(shm)
    whole = filesystem.f_blocks * filesystem.f_frsize
    if whole == 0:
        pytest.skip("this shared memory has no limit")
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    numbers = rf"has \d+ MiB free, {SETTING} asks for \d+ MiB .*lower {SETTING}.*shm_size"
    with pytest.raises(ConfigError, match=numbers):
        ControlFile(shm, Layout.for_budget(whole + 512 * MIB), True, SETTING)
    assert list(shm.iterdir()) == []
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before


def test_a_folder_that_is_not_there_is_named_with_its_setting(shm: Path) -> None:
    with pytest.raises(ConfigError, match=r"transport\.shm_dir: .*No such file or directory"):
        ControlFile(shm / "nowhere", LAYOUT, True, SETTING)


def test_a_slot_that_is_filled_anew_is_noticed(file: ControlFile, view: ControlView) -> None:
    file.claim(4, 1, 10)
    view.prove(4, 1, FOREVER_NS)
    file.claim(4, 2, 10)
    with pytest.raises(ReadNotProven, match="reused"):
        view.prove(4, 1, FOREVER_NS)
    view.prove(4, 2, FOREVER_NS)


def test_a_slot_that_was_never_filled_proves_nothing(view: ControlView) -> None:
    with pytest.raises(ReadNotProven):
        view.prove(7, 0, FOREVER_NS)


def test_a_read_must_be_over_before_its_lease(
    file: ControlFile, view: ControlView, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.claim(0, 1, 10)
    lease_ns = 10**12
    last = lease_ns - PROOF_MARGIN_NS - 1
    monkeypatch.setattr(control, "monotonic_ns", lambda: last)
    view.prove(0, 1, lease_ns)
    for late in (last + 1, lease_ns, lease_ns + 1):
        monkeypatch.setattr(control, "monotonic_ns", lambda late=late: late)
        with pytest.raises(ReadNotProven, match="lease"):
            view.prove(0, 1, lease_ns)


@pytest.mark.parametrize("lease_ns", [0, 1, PROOF_MARGIN_NS, 2**63])
def test_a_lease_is_any_number(file: ControlFile, view: ControlView, lease_ns: int) -> None:
    file.claim(0, 1, 10)
    if lease_ns == 2**63:
        view.prove(0, 1, lease_ns)
    else:
        with pytest.raises(ReadNotProven):
            view.prove(0, 1, lease_ns)


@pytest.mark.parametrize(("slot", "nbytes"), [(-1, 1), (8, 1), (10**6, 1), (2**32 - 1, 0), (0, -1), (0, 2**63)])
def test_slots_that_are_not_there_are_out_of_bounds(view: ControlView, slot: int, nbytes: int) -> None:
    with pytest.raises(ReadNotProven, match="does not have"):
        view.check_bounds(slot, nbytes)


def test_only_the_bytes_of_the_tensor_are_in_bounds(file: ControlFile, view: ControlView) -> None:
    file.claim(0, 1, 100)
    view.check_bounds(0, 100)
    for nbytes in (0, 99, 101, 64 * KIB):
        with pytest.raises(ReadNotProven, match="another size"):
            view.check_bounds(0, nbytes)
    with pytest.raises(ReadNotProven, match="does not have"):
        view.check_bounds(0, 64 * KIB + 1)


def test_an_arena_that_is_not_there_is_not_read(shm: Path, file: ControlFile) -> None:
    for arena_id, epoch in [(file.arena_id ^ 1, file.epoch), (file.arena_id, file.epoch ^ 1)]:
        with pytest.raises(ReadNotProven, match="not there"):
            ControlView(shm, arena_id, epoch)


def _other_size(file: Path) -> None:
    os.truncate(file, file.stat().st_size + 4096)


def _cut_off(file: Path) -> None:
    os.truncate(file, 10)


def _open_to_others(file: Path) -> None:
    file.chmod(0o644)


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file, 0o600)


@pytest.mark.parametrize("forge", [_other_size, _cut_off, _open_to_others, _pipe])
def test_a_file_that_is_no_sound_arena_is_not_read(shm: Path, file: ControlFile, forge: Callable[[Path], None]) -> None:
    forge(only_file(shm))
    with pytest.raises(ReadNotProven):
        ControlView(shm, file.arena_id, file.epoch)


def test_a_folder_with_an_arena_s_name_is_not_read(shm: Path) -> None:
    (shm / name_of(ARENA_ID, EPOCH)).mkdir(mode=0o700)
    with pytest.raises(ReadNotProven):
        ControlView(shm, ARENA_ID, EPOCH)


def forged_file(shm: Path, header: tuple[object, ...], nbytes: int) -> None:
    file = shm / name_of(ARENA_ID, EPOCH)
    file.touch(mode=0o600)
    file.write_bytes(control._HEADER.pack(*header, bytes(NONCE_BYTES)))
    os.truncate(file, nbytes)


def test_a_sound_header_is_believed(shm: Path) -> None:
    """So that each of the next test's headers is refused for what is wrong in it."""
    forged_file(shm, (b"MOSELARN", control._VERSION, True, ARENA_ID, EPOCH, *LAYOUT.counts), LAYOUT.total_bytes)
    view = ControlView(shm, ARENA_ID, EPOCH)
    assert view.layout == LAYOUT
    view.close()


@pytest.mark.parametrize(
    "header",
    [
        (b"WRONGARN", control._VERSION, True, ARENA_ID, EPOCH, *LAYOUT.counts),
        (b"MOSELARN", control._VERSION + 1, True, ARENA_ID, EPOCH, *LAYOUT.counts),
        (b"MOSELARN", control._VERSION, False, ARENA_ID, EPOCH, *LAYOUT.counts),
        (b"MOSELARN", control._VERSION, True, ARENA_ID + 1, EPOCH, *LAYOUT.counts),
        (b"MOSELARN", control._VERSION, True, ARENA_ID, EPOCH + 1, *LAYOUT.counts),
        (b"MOSELARN", control._VERSION, True, ARENA_ID, EPOCH, 7, 2, 0, 0, 0, 0),
        (b"MOSELARN", control._VERSION, True, ARENA_ID, EPOCH, *[2**32 - 1] * 6),
    ],
)
def test_a_forged_header_is_not_believed(shm: Path, header: tuple[object, ...]) -> None:
    forged_file(shm, header, LAYOUT.total_bytes)
    with pytest.raises(ReadNotProven):
        ControlView(shm, ARENA_ID, EPOCH)


def test_the_janitor_removes_what_killed_processes_left_and_only_that(shm: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from mosel.transport import SharedMemoryArena\n"
        "arena = SharedMemoryArena(Path(sys.argv[1]), 1 << 20, 's'); print('ready', flush=True); sys.stdin.read()"
    )
    mine = ControlFile(shm, LAYOUT, True, SETTING)
    mine.map[LAYOUT.data_start : LAYOUT.data_start + 4] = b"mine"
    command = [sys.executable, "-c", script, str(shm)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        assert remove_orphans(shm) == 0, "both owners live"
        child.send_signal(signal.SIGKILL)
    (shm / "somebody-else").write_bytes(b"")
    assert len(list(shm.iterdir())) == 3
    assert remove_orphans(shm) == 1
    assert len(list(shm.iterdir())) == 2
    view = ControlView(shm, mine.arena_id, mine.epoch)
    assert np.array_equal(np.frombuffer(view.map, np.uint8, 4, LAYOUT.data_start), np.frombuffer(b"mine", np.uint8))
    view.close()
    mine.close()


def test_a_janitor_that_comes_second_leaves_the_new_file_of_the_same_name(
    shm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = shm / name_of(ARENA_ID, EPOCH)
    name.write_bytes(b"orphan")
    lock = fcntl.flock

    def overtaken(fd: int, operation: int) -> None:
        """Between its open and its lock, another janitor removes the orphan and an arena takes the name."""
        name.unlink()
        name.write_bytes(b"new")
        lock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", overtaken)
    assert remove_orphans(shm) == 0
    assert name.read_bytes() == b"new"


def test_a_file_that_was_taken_for_an_orphan_before_it_was_locked_is_made_again(
    shm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, times = fcntl.flock, iter([1, 2])

    def too_late(fd: int, operation: int) -> None:
        if next(times, None):
            only_file(shm).unlink()
        lock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", too_late)
    file = ControlFile(shm, LAYOUT, True, SETTING)
    view = ControlView(shm, file.arena_id, file.epoch)
    view.close()
    monkeypatch.setattr(fcntl, "flock", lock)
    assert remove_orphans(shm) == 0, "it is locked"
    file.close()
    assert list(shm.iterdir()) == []
