"""What is written is checked first, then whole or not there: whatever goes wrong, and when."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import threading

import pytest

from kvlink.errors import ConfigError
from kvlink.files import Output, OutputFolder, whole_file

OLD, NEW = b"old and good", b"new " * 5000


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_there_when_the_block_ends_and_not_before(tmp_path):
    place = tmp_path / "x.kvl"
    place.write_bytes(OLD)
    with Output(place).open() as sink:
        assert sink.write(NEW[:100]) == 100
        assert place.read_bytes() == OLD
        sink.write(NEW[100:])
    assert place.read_bytes() == NEW
    assert names(tmp_path) == ["x.kvl"]


@pytest.mark.parametrize(
    "trouble", [ValueError("a bug"), KeyboardInterrupt(), SystemExit(143), ConfigError("no")]
)
@pytest.mark.parametrize("before", [OLD, None])
def test_what_ends_the_work_in_the_middle_leaves_everything_as_it_was(tmp_path, trouble, before):
    place = tmp_path / "x.kvl"
    if before is not None:
        place.write_bytes(before)
    seen = names(tmp_path)
    with pytest.raises(type(trouble)), Output(place).open() as sink:
        sink.write(NEW)
        raise trouble
    assert names(tmp_path) == seen
    assert before is None or place.read_bytes() == before


CUT = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever started the tests may have ignored them
signal.signal(signal.SIGINT, signal.default_int_handler)
from kvlink.files import Output
with Output(Path(sys.argv[1])).open() as sink:
    sink.write(b"n" * 20_000)
    print("half", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_in_the_middle_leaves_everything_as_it_was(tmp_path, number):
    place = tmp_path / "x.kvl"
    place.write_bytes(OLD)
    writing = subprocess.Popen(
        [sys.executable, "-c", CUT, str(place)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert writing.stdout is not None
    assert writing.stdout.readline() == b"half\n"
    assert len(names(tmp_path)) == 2
    writing.send_signal(number)
    assert writing.wait() in (128 + number, -signal.SIGINT)
    writing.stdout.close()
    assert names(tmp_path) == ["x.kvl"]
    assert place.read_bytes() == OLD


FULL = """
import resource, sys
from pathlib import Path
from kvlink.errors import ConfigError
from kvlink.files import Output
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    Output(Path(sys.argv[1])).write(b"n" * 20_000)
except ConfigError as error:
    print(error)
"""


@pytest.mark.parametrize("before", [OLD, None])
def test_a_quota_leaves_everything_as_it_was(tmp_path, before):
    place = tmp_path / "x.kvl"
    if before is not None:
        place.write_bytes(before)
    seen = names(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(place)], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"cannot write {place}: File too large\n"
    assert names(tmp_path) == seen
    assert before is None or place.read_bytes() == before


@pytest.mark.parametrize("step", ["fsync", "replace", "write"])
def test_a_disk_that_fails_at_any_step_leaves_everything_as_it_was(tmp_path, monkeypatch, step):
    place = tmp_path / "x.kvl"
    place.write_bytes(OLD)
    output = Output(place)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(ConfigError, match=r"cannot write .*x\.kvl: No space left on device"):
        output.write(NEW)
    monkeypatch.undo()
    assert names(tmp_path) == ["x.kvl"]
    assert place.read_bytes() == OLD


def test_a_short_write_is_followed_by_the_rest(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:7]))
    Output(tmp_path / "x").write(NEW)
    assert (tmp_path / "x").read_bytes() == NEW


def test_permissions_stay_and_new_files_have_the_usual_ones(tmp_path):
    old, new, asked = tmp_path / "old", tmp_path / "new", tmp_path / "asked"
    old.write_bytes(OLD)
    old.chmod(0o640)
    before = os.umask(0o027)
    try:
        Output(old).write(NEW)
        Output(new).write(NEW)
    finally:
        os.umask(before)
    with whole_file(asked, mode=0o600) as sink:
        sink.write(NEW)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (old, new, asked)] == [0o640, 0o640, 0o600]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    place, link, dangling = tmp_path / "there" / "x", tmp_path / "link", tmp_path / "dangling"
    place.write_bytes(OLD)
    link.symlink_to("there/x")
    dangling.symlink_to(tmp_path / "there" / "y")
    Output(link).write(NEW)
    Output(dangling).write(NEW)
    assert link.is_symlink() and dangling.is_symlink()
    assert place.read_bytes() == (tmp_path / "there" / "y").read_bytes() == NEW
    assert names(tmp_path / "there") == ["x", "y"]


def _no_folder(folder):
    return folder / "no" / "such" / "x", "there is no folder"


def _folder(folder):
    return folder, "it is a folder"


def _file_as_folder(folder):
    (folder / "file").write_bytes(OLD)
    return folder / "file" / "x", "Not a directory"


def _socket(folder):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "s"))
    return folder / "s", "it is a socket"


def _loop(folder):
    (folder / "a").symlink_to("b")
    (folder / "b").symlink_to("a")
    return folder / "a", "Too many levels"


def _long_name(folder):
    return folder / ("x" * 300), "File name too long"


def _zero_byte(folder):
    return folder / "x\0y", "null"


def _closed_descriptor(folder):
    return folder.__class__("/dev/fd/9999"), "Bad file descriptor"


@pytest.mark.parametrize(
    "make", [_no_folder, _folder, _file_as_folder, _socket, _loop, _long_name, _zero_byte, _closed_descriptor]
)
def test_what_cannot_be_written_is_refused_before_the_work(tmp_path, make):
    place, reason = make(tmp_path)
    with pytest.raises(ConfigError, match=reason):
        Output(place)


def test_without_the_right_to_write_it_is_refused_before_the_work(tmp_path, monkeypatch):
    place = tmp_path / "x"
    place.write_bytes(OLD)
    for barred, reason in (
        (place, "it may not be written to"),
        (tmp_path, "the folder .* may not be written to"),
    ):
        # Rights bind nobody who runs tests as root.
        monkeypatch.setattr(os, "access", lambda path, _, barred=barred: os.fspath(path) != os.fspath(barred))
        with pytest.raises(ConfigError, match=reason):
            Output(place)


def test_an_output_is_none_of_what_is_read(tmp_path):
    source, link, other = tmp_path / "in", tmp_path / "link", tmp_path / "hard"
    source.write_bytes(OLD)
    link.symlink_to(source)
    other.hardlink_to(source)
    for place in (source, link, other):
        with pytest.raises(ConfigError, match="it is what is read"):
            Output(place, reads=("-", "no such file", source))
    Output(tmp_path / "out", reads=(source, "-"))


def test_what_is_no_file_is_written_to_as_it_is(tmp_path):
    Output(tmp_path.__class__("/dev/null")).write(NEW)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    Output(pipe).write(NEW)
    reader.join()
    assert got == [NEW]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    with pytest.raises(ConfigError, match="/dev/full: No space left on device"):
        Output(tmp_path.__class__("/dev/full")).write(NEW)


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
@pytest.mark.parametrize("kind", ["file", "pipe"])
def test_standard_output_goes_on_where_it_was(tmp_path, name, kind):
    """A file that the shell opened is neither replaced nor emptied, and what is said later follows."""
    if name == "link":
        (tmp_path / name).symlink_to("/dev/stdout")
        name = str(tmp_path / name)
    code = (
        "import sys; from pathlib import Path; from kvlink.files import Output; print('before', flush=True)\n"
        "output = Output(Path(sys.argv[1])); assert output.is_standard_output\n"
        "output.write(b'whole\\n'); print('after')"
    )
    command = [sys.executable, "-c", code, name]
    if kind == "file":
        with (tmp_path / "out").open("wb") as out:
            subprocess.run(command, stdout=out, check=True)
        told = (tmp_path / "out").read_bytes()
    else:
        told = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    assert told == b"before\nwhole\nafter\n"


def test_a_pipe_that_nobody_reads_is_no_error_of_the_files(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        with pytest.raises(BrokenPipeError):
            Output(tmp_path.__class__(f"/dev/fd/{writer}")).write(NEW)
    finally:
        os.close(writer)


def test_a_folder_is_made_or_refused_before_the_work(tmp_path):
    made = OutputFolder(tmp_path / "a" / "b")
    made.file("x").write(NEW)
    assert (tmp_path / "a" / "b" / "x").read_bytes() == NEW
    (tmp_path / "file").write_bytes(OLD)
    for place, reason in (
        (tmp_path / "file", "it is no folder"),
        (tmp_path / "file" / "under", "Not a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "x\0", "null"),
    ):
        with pytest.raises(ConfigError, match=reason):
            OutputFolder(place)


def test_a_disk_without_room(tmp_path):
    """A small file system of its own, where this machine lets one be made."""
    code = FULL.replace("resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))", "")
    script = (
        f"mount -t tmpfs -o size=16k tmpfs {tmp_path} && printf old > {tmp_path}/x"
        f' && {sys.executable} -c "$1" {tmp_path}/x && ls -A {tmp_path} && cat {tmp_path}/x'
    )
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", code], capture_output=True, text=True, check=False
    )
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip("this machine lets nobody mount")
    assert done.stdout == f"cannot write {tmp_path}/x: No space left on device\nx\nold"
