"""Arenas as files in POSIX shared memory."""

import os
import secrets
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mosel.errors import ConfigError, Overloaded, PayloadTooLarge, ReadNotProven
from mosel.transport import shared_memory
from mosel.transport.layout import KIB, MIB
from mosel.transport.shared_memory import Arena, ArenaView, remove_orphans
from mosel.transport.slots import Slot

SETTING = "transport.gateway_arena_mib"
ROOT = Path(__file__).parents[3]


@pytest.fixture
def arena(shm: Path) -> Iterator[Arena]:
    with Arena(shm, MIB, SETTING) as arena:
        yield arena


@pytest.fixture
def view(shm: Path, arena: Arena) -> Iterator[ArenaView]:
    view = ArenaView(shm, arena.arena_id, arena.epoch)
    yield view
    view.close()


def only_file(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


def write(arena: Arena, data: bytes, lease_s: float = 60.0) -> Slot:
    return arena.write(memoryview(data), time.monotonic() + lease_s)


@pytest.mark.usefixtures("arena")
def test_the_file_is_reserved_and_for_its_owner_alone(shm: Path) -> None:
    status = only_file(shm).stat()
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_blocks * 512 >= status.st_size


def test_a_file_that_is_there_already_is_never_taken_over(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "randbits", lambda _: 7)
    with Arena(shm, MIB, SETTING) as first:
        slot = write(first, b"mine")
        with pytest.raises(ConfigError, match=r"transport\.shm_dir: cannot create .*File exists"):
            Arena(shm, MIB, SETTING)
        view = ArenaView(shm, 7, 7)
        assert view.bytes_of(slot.index, 4).tobytes() == b"mine"
        view.close()


def test_a_link_in_the_way_is_not_followed(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "randbits", lambda _: 7)
    target = shm / "target"
    (shm / f"mosel-arena-{7:016x}-{7:016x}").symlink_to(target)
    with pytest.raises(ConfigError, match="cannot create"):
        Arena(shm, MIB, SETTING)
    assert not target.exists()
    target.write_bytes(b"x")
    with pytest.raises(ReadNotProven):
        ArenaView(shm, 7, 7)


def test_a_consumer_reads_what_was_written_and_cannot_write(arena: Arena, view: ArenaView) -> None:
    slots = [write(arena, bytes([i]) * 1000 * (i + 1)) for i in range(4)]
    for i, slot in enumerate(slots):
        data = view.bytes_of(slot.index, 1000 * (i + 1))
        view.prove(slot.index, slot.generation)
        assert set(data.tolist()) == {i}
        assert not data.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            data[0] = 1
        del data
    with pytest.raises(TypeError):
        view._map[0] = 1


def test_a_closed_arena_leaves_nothing_and_its_readers_keep_their_map(shm: Path) -> None:
    with Arena(shm, MIB, SETTING) as arena:
        slot = write(arena, b"still here")
        view = ArenaView(shm, arena.arena_id, arena.epoch)
        assert not view.is_gone()
    assert list(shm.iterdir()) == []
    arena.close()
    assert view.is_gone()
    assert view.bytes_of(slot.index, 10).tobytes() == b"still here"
    view.close()


def test_a_full_arena_is_overload_until_a_slot_is_released(arena: Arena) -> None:
    slots = [write(arena, b"x") for _ in range(arena.layout.slot_count)]
    with pytest.raises(Overloaded, match=SETTING):
        write(arena, b"x")
    assert arena.release(slots[0].index, slots[0].generation)
    assert not arena.release(slots[0].index, slots[0].generation)
    assert write(arena, b"x").index == slots[0].index
    statistics = arena.statistics()
    assert (statistics.free, statistics.filling, statistics.refused_total) == (0, 0, 1)


def test_leases_that_are_over_make_room(arena: Arena) -> None:
    for _ in range(3 * arena.layout.slot_count):
        write(arena, b"x", lease_s=0.0)
    assert arena.statistics().published == 0


def test_a_tensor_larger_than_every_slot_names_the_limit_and_the_setting(arena: Arena) -> None:
    assert arena.largest_slot == 256 * KIB
    write(arena, bytes(256 * KIB))
    with pytest.raises(PayloadTooLarge, match=f"262145 bytes is larger than the largest slot, 262144 .*{SETTING}"):
        write(arena, bytes(256 * KIB + 1))


def test_an_arena_too_large_for_the_filesystem_gives_the_numbers_and_leaves_nothing(shm: Path) -> None:
    filesystem = os.statvfs(shm)
    whole = filesystem.f_blocks * filesystem.f_frsize
    if whole == 0:
        pytest.skip("this shared memory has no limit")
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(ConfigError, match=rf"has \d+ MiB free, {SETTING} asks for \d+ MiB .*lower {SETTING}"):
        Arena(shm, whole + 512 * MIB, SETTING)
    assert list(shm.iterdir()) == []
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before


def test_a_folder_that_is_not_there_is_named_with_its_setting(shm: Path) -> None:
    with pytest.raises(ConfigError, match=r"transport\.shm_dir: .*No such file or directory"):
        Arena(shm / "nowhere", MIB, SETTING)


def test_a_slot_that_is_used_again_is_noticed(arena: Arena, view: ArenaView) -> None:
    slot = write(arena, b"old")
    old = slot.generation
    arena.release(slot.index, old)
    view.prove(slot.index, old)  # released, but not yet another's
    while write(arena, b"new").index != slot.index:
        pass
    with pytest.raises(ReadNotProven, match="reused"):
        view.prove(slot.index, old)


def test_a_slot_that_was_never_published_proves_nothing(arena: Arena, view: ArenaView) -> None:
    with pytest.raises(ReadNotProven):
        view.prove(arena.layout.slot_count - 1, 0)


@pytest.mark.parametrize(("slot", "nbytes"), [(-1, 1), (10**6, 1), (0, 64 * KIB + 1), (0, -1), (0, 2**63)])
def test_nothing_outside_a_slot_is_read(view: ArenaView, slot: int, nbytes: int) -> None:
    with pytest.raises(ReadNotProven):
        view.bytes_of(slot, nbytes)


def test_an_arena_that_is_not_there_is_not_read(shm: Path, arena: Arena) -> None:
    for arena_id, epoch in [(arena.arena_id ^ 1, arena.epoch), (arena.arena_id, arena.epoch ^ 1)]:
        with pytest.raises(ReadNotProven, match="not there"):
            ArenaView(shm, arena_id, epoch)


def _other_size(file: Path) -> None:
    os.truncate(file, file.stat().st_size + 4096)


def _cut_off(file: Path) -> None:
    os.truncate(file, 10)


def _open_to_others(file: Path) -> None:
    file.chmod(0o644)


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir(mode=0o700)


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file, 0o600)


@pytest.mark.usefixtures("arena")
@pytest.mark.parametrize("forge", [_other_size, _cut_off, _open_to_others, _pipe])
def test_a_file_that_is_no_sound_arena_is_not_read(shm: Path, arena: Arena, forge: object) -> None:
    assert callable(forge)
    forge(only_file(shm))
    with pytest.raises(ReadNotProven):
        ArenaView(shm, arena.arena_id, arena.epoch)


def test_a_folder_with_an_arena_s_name_is_not_read(shm: Path) -> None:
    (shm / f"mosel-arena-{1:016x}-{2:016x}").mkdir(mode=0o700)
    with pytest.raises(ReadNotProven):
        ArenaView(shm, 1, 2)


@pytest.mark.parametrize(
    "header",
    [
        (b"WRONGARN", 1, 1, 2, 6, 2, 0, 0, 0, 0),
        (b"MOSELARN", 2, 1, 2, 6, 2, 0, 0, 0, 0),
        (b"MOSELARN", 1, 3, 2, 6, 2, 0, 0, 0, 0),
        (b"MOSELARN", 1, 1, 3, 6, 2, 0, 0, 0, 0),
        (b"MOSELARN", 1, 1, 2, 7, 2, 0, 0, 0, 0),
        (b"MOSELARN", 1, 1, 2, *[2**32 - 1] * 6),
    ],
)
def test_a_forged_header_is_not_believed(shm: Path, header: tuple[object, ...]) -> None:
    with Arena(shm, MIB, SETTING) as arena:
        size = arena.layout.total_bytes
    file = shm / f"mosel-arena-{1:016x}-{2:016x}"
    file.touch(mode=0o600)
    file.write_bytes(shared_memory._HEADER.pack(*header))
    os.truncate(file, size)
    with pytest.raises(ReadNotProven):
        ArenaView(shm, 1, 2)


def test_the_janitor_removes_what_killed_processes_left_and_only_that(shm: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from mosel.transport import Arena\n"
        "arena = Arena(Path(sys.argv[1]), 1 << 20, 'setting'); print('ready', flush=True); sys.stdin.read()"
    )
    with Arena(shm, MIB, SETTING) as mine:
        slot = write(mine, b"mine")
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
        view = ArenaView(shm, mine.arena_id, mine.epoch)
        assert np.array_equal(view.bytes_of(slot.index, 4), np.frombuffer(b"mine", np.uint8))
        view.close()
