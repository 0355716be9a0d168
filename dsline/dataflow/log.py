"""The log behind ``file://``: a folder of segment files with checked records, appended by one writer, read by anybody.

``docs/dataflow/log.md`` has the byte tables. A record is one item; it is written by one call of the kernel, with its
length and sums in front, so that whatever ends a writer leaves a prefix of whole records and at most one torn one behind
them. The next writer cuts that one off.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import mmap
import os
import re
import secrets
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from dsline._core import crc32c
from dsline.closing import Closing
from dsline.dataflow.npy_files import sync_folder
from dsline.dataflow.operator import Schema
from dsline.dataflow.records import (
    ALIGNMENT,
    ARRAY,
    BYTES,
    COLUMNS,
    END,
    HEADER_BYTES,
    MOST_BYTES,
    OBJECT,
    RECORD_MAGIC,
    Encoded,
    Header,
    LogRecord,
    body_sum,
    encode,
    joined,
    pack_header,
    parts_of,
    read_header,
    record_size,
)
from dsline.errors import (
    CorruptedMessageError,
    LogError,
    PipelineBuildError,
    PipelineRuntimeError,
    SerializationError,
)
from dsline.specs import ArraySpec

__all__ = [
    "Cut",
    "LogReader",
    "LogRecord",
    "LogWriter",
    "check_reader",
    "check_writer",
    "commit_group",
    "log_schema",
    "parse_interval",
]

# Magic, version, header bytes, first sequence, created, uuid, CRC.
_SEGMENT: Final = struct.Struct("<8sIIQq16s12xI")
_SEGMENT_MAGIC: Final = b"DSLINLOG"
_VERSION: Final = 1
_WORD: Final = struct.Struct("<I")
_SUFFIX: Final = ".dsl"
_NAME: Final = re.compile(r"([0-9]{20})\.dsl")
_GROUP_NAME: Final = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,100}")
_WINDOW_BYTES: Final = 64 << 20  # mapped at a time
_COPIED_BYTES: Final = 1 << 20
_MOST_BUFFERS: Final = 512  # per call of writev
# Seconds between two looks at the end of a log that is followed: first, and at most.
_POLLS: Final = (0.002, 0.05)
_INTERVAL: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(us|ms|s|m)")
_UNITS: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}


# --- segments -----------------------------------------------------------------------------------------------------------


def _segment_path(folder: str, first: int) -> str:
    return os.path.join(folder, f"{first:020}{_SUFFIX}")


def _sync_file(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def _segments(folder: str) -> list[int]:
    """First sequences of the segments, sorted."""
    matches = (_NAME.fullmatch(name) for name in os.listdir(folder))
    return sorted(int(match[1]) for match in matches if match)


def _segment_header(first: int, uuid: bytes) -> bytes:
    head = _SEGMENT.pack(_SEGMENT_MAGIC, _VERSION, HEADER_BYTES, first, time.time_ns(), uuid, 0)
    return head[:60] + _WORD.pack(crc32c(head[:60]))


def _segment_uuid(raw: bytes, first: int) -> bytes | None:
    """The log's uuid in the header of a segment; None where it is none."""
    if len(raw) < HEADER_BYTES:
        return None
    magic, version, size, begins, _, uuid, crc = _SEGMENT.unpack(raw[:HEADER_BYTES])
    right = magic == _SEGMENT_MAGIC and version == _VERSION and size == HEADER_BYTES and begins == first
    return uuid if right and crc == crc32c(raw[:60]) else None


def _failed(path: str, doing: str, error: OSError) -> LogError:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason = "no space is left on the disk; what was written before is whole, make room and go on"
    return LogError(error.errno or errno.EIO, f"log {path!r}: {doing}: {reason}")


@dataclasses.dataclass(frozen=True)
class Cut:
    """What a writer cut off when it opened a log, or before it appended to a shared one.

    Attributes
    ----------
    sequence : int
        Of the record that was not whole: it is given to the next one that is written.
    nbytes : int
        That were cut off.
    reason : str
        What was wrong.
    saved : str or None
        File with the bytes, where whole records stood behind the bad one.
    """

    sequence: int
    nbytes: int
    reason: str
    saved: str | None


class LogWriter(Closing):
    """Appends items to a log.

    Parameters
    ----------
    path : str or path
        Folder of the log, made where it is not there.
    sync : None, str or float
        When records are written through to the disk. None: when `flush` is called; they survive the death of every process
        at once, but not a loss of power. An interval ("100ms", "2s", seconds): that long after they were written, by a
        thread. "always": before `append` returns.
    segment_bytes : int
        A new file is begun when a record would make the last one larger.
    shared : bool
        False: the log is locked until `close`. True: other shared writers, in this and other processes, append in turns; it
        is locked for each record.

    Attributes
    ----------
    next_sequence : int
        Of the next record.
    cuts : list of Cut
        Torn records that were found and cut off.

    Raises
    ------
    LogError
        Another writer has the log; the folder holds something else; the disk refuses.

    Notes
    -----
    Safe to share between threads. Not to be used by a forked child.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        sync: str | float | None = None,
        segment_bytes: int = 256 << 20,
        shared: bool = False,
    ) -> None:
        self._path = os.path.abspath(os.fspath(path))
        check_writer(self._path, sync, segment_bytes)
        self._always = sync == "always"
        self._interval = None if sync is None or self._always else parse_interval(sync)
        self._segment_bytes = segment_bytes
        self._shared = shared
        self._mutex = threading.RLock()
        self._segment: int | None = None  # first sequence of the open one
        self._file = -1
        self._inode = -1
        self._at = 0
        self._uuid = bytes(16)
        self._unsynced: list[int] = []  # segments before the open one that may not be on the disk
        self._folder_unsynced = False
        self._failure: OSError | None = None
        self._syncer: _Syncer | None = None
        self.next_sequence = 0
        self.cuts: list[Cut] = []
        os.makedirs(self._path, exist_ok=True)
        self._lock = os.open(
            os.path.join(self._path, "writer.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644
        )
        try:
            self._take_lock()
            try:
                self._catch_up()
            finally:
                if shared:
                    fcntl.flock(self._lock, fcntl.LOCK_UN)
        except BaseException:
            self._close_files()
            raise

    # --- the lock ---

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX if self._shared else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._lock, 32, 0).decode("ascii", "replace").strip()
            raise LogError(
                errno.EAGAIN,
                f"log {self._path!r} has a writer already{f', process {holder}' if holder else ''}; a log has one at a time",
            ) from None
        if not self._shared:
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, str(os.getpid()).encode(), 0)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Hold the log; of a shared one, see what the others have appended."""
        with self._mutex:
            if self._lock < 0:
                raise LogError(errno.EBADF, f"the writer of log {self._path!r} is closed")
            if self._failure is not None:
                raise self._failure
            if not self._shared:
                yield
                return
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            try:
                self._catch_up()
                yield
            finally:
                fcntl.flock(self._lock, fcntl.LOCK_UN)

    # --- the end of the log ---

    def _catch_up(self) -> None:
        """Find the end; cut off what is torn behind it."""
        try:
            segments = _segments(self._path)
            if self._segment is None:
                self._unsynced = segments[:-1]  # whoever wrote them may not have done it
            elif segments and segments[-1] != self._segment:
                self._unsynced += [first for first in segments[:-1] if first >= self._segment]
            while segments and not self._follow(segments[-1]):
                # Made shortly before a loss of power: its name came to the disk, its header did not.
                os.unlink(_segment_path(self._path, segments.pop()))
                self._segment = None
            if not segments:
                self._sweep()
                self._uuid = secrets.token_bytes(16)
                self._begin_segment(0)
        except OSError as error:
            raise (
                error if isinstance(error, LogError) else _failed(self._path, "opening it", error)
            ) from error

    def _sweep(self) -> None:
        """Refuse a folder with something else in it."""
        foreign = [
            name
            for name in os.listdir(self._path)
            if name not in ("writer.lock", "groups") and ".dsl" not in name
        ]
        if foreign:
            raise LogError(
                errno.EEXIST,
                f"folder {self._path!r} is no log: it holds {foreign[0]!r}; give a folder of its own, or one that is not there",
            )

    def _follow(self, first: int) -> bool:
        """Go to the end of the last segment. False where it has no header and nothing in it."""
        path = _segment_path(self._path, first)
        status = os.stat(path)
        if self._segment != first or status.st_ino != self._inode:
            if not self._open_segment(first, path):
                return False
            status = os.fstat(self._file)
        if status.st_size > self._at:
            self._scan(first, path, status.st_size)
        return True

    def _open_segment(self, first: int, path: str) -> bool:
        self._close_segment()
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        head = os.pread(file, HEADER_BYTES, 0)
        uuid = _segment_uuid(head, first)
        if uuid is None:
            os.close(file)
            if not head.strip(b"\0") and os.path.getsize(path) <= HEADER_BYTES:
                return False
            raise LogError(
                errno.EINVAL,
                f"log {self._path!r}: {os.path.basename(path)} is no segment of this version, or damaged",
            )
        self._file, self._segment, self._uuid = file, first, uuid
        self._inode = os.fstat(file).st_ino
        self._at, self.next_sequence = HEADER_BYTES, first
        return True

    def _scan(self, first: int, path: str, size: int) -> None:
        """Take in whole records from here on; cut off the rest."""
        with mmap.mmap(self._file, size, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
            at, reason = self._at, ""
            while at < size:
                reason, header = _check_record(view, at, size, self.next_sequence)
                if header is None:
                    break
                at += header.record_bytes
                self.next_sequence += header.kind != END
            self._at = at
            if at == size:
                return
            saved = self._save_tail(view, at, path)
        self._cut(size, reason, saved)

    def _save_tail(self, view: memoryview, at: int, path: str) -> str | None:
        """Keep what is to be cut off where there are whole records in it: it is more than a torn end."""
        tail = bytes(view[at:])
        found = tail.find(RECORD_MAGIC, 1)
        while found >= 0:
            raw = tail[found : found + HEADER_BYTES]
            if len(raw) == HEADER_BYTES and read_header(raw) is not None:
                saved = f"{path}.cut-{time.time_ns()}"
                with open(saved, "xb") as file:
                    file.write(tail)
                return saved
            found = tail.find(RECORD_MAGIC, found + 1)
        return None

    def _cut(self, size: int, reason: str, saved: str | None) -> None:
        """End the last segment where its whole records end."""
        self.cuts.append(Cut(self.next_sequence, size - self._at, reason, saved))
        self._replace_segment()

    def _replace_segment(self) -> None:
        """End the open segment at `_at`, in a file of its own: readers may have mapped the rest of the old one."""
        assert self._segment is not None
        path = _segment_path(self._path, self._segment)
        temporary = f"{path}.tmp"
        try:
            copy = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            try:
                done = 0
                while done < self._at:
                    piece = os.pread(self._file, min(_COPIED_BYTES, self._at - done), done)
                    if not piece:
                        raise OSError(errno.EIO, "the file is shorter than it was")
                    done += os.pwrite(copy, piece, done)
                os.fsync(copy)
                os.replace(temporary, path)
            except BaseException:
                os.close(copy)
                raise
            os.close(self._file)
            self._file, self._inode = copy, os.fstat(copy).st_ino
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            os.ftruncate(self._file, self._at)
        os.fsync(self._file)
        sync_folder(self._path)

    def _begin_segment(self, first: int) -> None:
        path = _segment_path(self._path, first)
        temporary = f"{path}.tmp"
        file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            os.pwrite(file, _segment_header(first, self._uuid), 0)
            if self._syncs:
                os.fsync(file)
            os.replace(temporary, path)  # never a name without a header, but after a loss of power
            if self._syncs:
                sync_folder(self._path)
            else:
                self._folder_unsynced = True
        except BaseException:
            os.close(file)
            raise
        self._close_segment()
        self._file, self._segment, self._at = file, first, HEADER_BYTES
        self._inode = os.fstat(file).st_ino

    @property
    def _syncs(self) -> bool:
        return self._always or self._interval is not None

    def _close_segment(self) -> None:
        if self._file >= 0:
            file, self._file, self._segment = self._file, -1, None
            os.close(file)

    # --- appending ---

    def append(self, item: Any, *, timestamp_ns: int | None = None) -> int:
        """Write an item behind the last one.

        Parameters
        ----------
        item : object
            Arrays and a `Batch` of columns are written as they lie, without pickle; bytes too; anything else by pickle
            (protocol 5, arrays in it beside it).
        timestamp_ns : int, optional
            By default the time of day.

        Returns
        -------
        int
            The sequence of the record.

        Raises
        ------
        SerializationError
            The item cannot be pickled.
        LogError
            The disk refuses; the log is as it was before the call.
        """
        encoded = encode(item)
        with self._turn():
            sequence = self.next_sequence
            self._write(encoded, time.time_ns() if timestamp_ns is None else timestamp_ns)
            self.next_sequence += 1
            self._written()
        return sequence

    def end(self) -> None:
        """Write an END, at which readers that follow the log stop, and write all through to the disk."""
        with self._turn():
            self._write(joined(END, [], []), time.time_ns())
            self._sync()

    def _write(self, encoded: Encoded, timestamp_ns: int) -> None:
        kind, description, pieces, nbytes, alignment = encoded
        offset, size = record_size(self._at, len(description), nbytes, alignment)
        if self._at + size > self._segment_bytes and self._at > HEADER_BYTES:
            self._rotate()
            offset, size = record_size(self._at, len(description), nbytes, alignment)
        crc = crc32c(description)
        for piece in pieces:
            crc = crc32c(piece, crc)
        head = pack_header(
            Header(kind, self.next_sequence, timestamp_ns, nbytes, offset, crc, size, len(description))
        )
        gap = bytes(offset - HEADER_BYTES - len(description))
        lead = b"".join((head, description, gap))
        self._write_all([lead, *pieces, bytes(size - offset - nbytes)], size)
        self._at += size

    def _write_all(self, pieces: list[Any], size: int) -> None:
        done = 0
        try:
            while done < size:
                count = os.pwritev(self._file, pieces[:_MOST_BUFFERS], self._at + done)
                done += count
                if done < size:
                    pieces = _behind(pieces, count)
        except BaseException as error:
            # What is there of the record goes; nobody has taken it for one.
            try:
                os.ftruncate(self._file, self._at)
            except OSError as failure:
                self._failure = _failed(
                    self._path, "cutting off a record that was not written whole", failure
                )
            if isinstance(error, OSError):
                raise _failed(
                    self._path, f"writing record {self.next_sequence} of {size} bytes", error
                ) from error
            raise

    def _rotate(self) -> None:
        try:
            if self._syncs:
                self._sync()
            elif self._segment is not None:
                self._unsynced.append(self._segment)
            self._begin_segment(self.next_sequence)
        except OSError as error:
            raise (
                error if isinstance(error, LogError) else _failed(self._path, "beginning a segment", error)
            ) from error

    def _written(self) -> None:
        if self._always:
            self._sync()
        elif self._interval is not None:
            if self._syncer is None:
                self._syncer = _Syncer(self._interval, self._sync_from_thread)
            self._syncer.wake()

    def _sync(self) -> None:
        try:
            while self._unsynced:
                with contextlib.suppress(FileNotFoundError):  # cut off meanwhile
                    _sync_file(_segment_path(self._path, self._unsynced[-1]))
                self._unsynced.pop()
            os.fdatasync(self._file)
            if self._folder_unsynced:
                sync_folder(self._path)
                self._folder_unsynced = False
        except OSError as error:
            # The kernel has dropped the pages that it could not write: nothing can be promised any more.
            self._failure = _failed(self._path, "writing through to the disk", error)
            raise self._failure from error

    def _sync_from_thread(self) -> None:
        with self._mutex:
            if self._file < 0:
                return
            file = os.dup(self._file)
        try:
            os.fdatasync(file)
        except OSError as error:
            self._failure = _failed(self._path, "writing through to the disk", error)
        finally:
            os.close(file)

    def flush(self) -> None:
        """Write all records through to the disk. Blocks until they are there."""
        with self._turn():
            self._sync()

    # --- checkpoints ---

    def position(self) -> dict[str, int]:
        """Return what `restore` needs to come back here."""
        with self._turn():
            return {"sequence": self.next_sequence}

    def restore(self, position: Mapping[str, int]) -> None:
        """Remove every record that was written after `position` was taken.

        Readers that have mapped them keep them; readers that follow the log wait until the log is longer again.

        Raises
        ------
        PipelineRuntimeError
            The log is shorter, so it is not the one of the checkpoint, or lost records when the power went.
        LogError
            The disk refuses.
        """
        wanted = int(position["sequence"])
        with self._turn():
            if wanted > self.next_sequence or wanted < min(_segments(self._path), default=0):
                raise PipelineRuntimeError(
                    f"log {self._path!r} ends at record {self.next_sequence}, and the checkpoint at {wanted}: it is another log, "
                    "or lost records with the power; start anew without resume"
                )
            try:
                self._cut_to(wanted)
            except OSError as error:
                raise (
                    error if isinstance(error, LogError) else _failed(self._path, "cutting it", error)
                ) from error

    def _cut_to(self, wanted: int) -> None:
        segments = _segments(self._path)
        while len(segments) > 1 and segments[-1] > wanted:
            os.unlink(
                _segment_path(self._path, segments.pop())
            )  # the last one first: what is left is always a log
        first = segments[-1]
        if self._segment != first and not self._open_segment(first, _segment_path(self._path, first)):
            raise LogError(errno.EINVAL, f"log {self._path!r}: its last segment is damaged")
        size = os.fstat(self._file).st_size
        with mmap.mmap(self._file, size, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
            at, sequence = HEADER_BYTES, first
            while sequence < wanted:
                reason, header = _check_record(view, at, size, sequence)
                if header is None:
                    raise LogError(errno.EINVAL, f"log {self._path!r}: record {sequence} {reason}")
                at += header.record_bytes
                sequence += header.kind != END
        self._at, self.next_sequence = at, wanted
        if at < size:
            self._replace_segment()

    # --- the end ---

    def close(self) -> None:
        """End the writer; with an interval, write all through to the disk."""
        syncer, self._syncer = self._syncer, None
        if syncer is not None:
            syncer.stop()
        with self._mutex:
            try:
                if self._file >= 0 and self._interval is not None and self._failure is None:
                    self._sync()
            finally:
                self._close_files()

    def _close_files(self) -> None:
        self._close_segment()
        if self._lock >= 0:
            lock, self._lock = self._lock, -1
            os.close(lock)

    def __del__(self) -> None:
        if getattr(self, "_lock", -1) >= 0:
            self.close()


def _behind(pieces: list[Any], count: int) -> list[Any]:
    """What of the buffers comes behind the first `count` bytes."""
    for number, piece in enumerate(pieces):
        size = memoryview(piece).nbytes
        if count < size:
            return [memoryview(piece).cast("B")[count:], *pieces[number + 1 :]]
        count -= size
    return []


def _check_record(view: memoryview, at: int, size: int, sequence: int) -> tuple[str, Header | None]:
    """Check the whole record at an offset. Returns what is wrong with it, or its header."""
    if size - at < HEADER_BYTES:
        return "is cut off in its header", None
    header = read_header(bytes(view[at : at + HEADER_BYTES]))
    if header is None:
        return "has no header", None
    if header.sequence != sequence:
        return f"says that it is {header.sequence}", None
    if header.record_bytes > size - at:
        return "is cut off", None
    if body_sum(view, at, header) != header.body_crc:
        return "has another sum than was written", None
    return "", header


class _Syncer:
    """A thread that calls `sync` an interval after the first record that it has not been called for."""

    def __init__(self, interval: float, sync: Callable[[], None]) -> None:
        self._interval = interval
        self._sync = sync
        self._dirty = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dsline-log-sync", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        self._dirty.set()

    def stop(self) -> None:
        self._stopping.set()
        self._dirty.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._dirty.wait()
            if self._stopping.wait(self._interval):
                return
            self._dirty.clear()
            self._sync()


# --- reading ------------------------------------------------------------------------------------------------------------


class LogReader(Closing):
    """Reads the records of a log, also while somebody writes it.

    Parameters
    ----------
    path : str or path
        Folder of the log.
    start : str or int
        "earliest": the first record that is there; "latest": only what is written from now on; a number: the record of
        that sequence.
    group : str, optional
        A name under which `commit` keeps a position in the log's folder; where there is one, the reader begins there and
        `start` does not count. One reader at a time may have a group.
    follow : bool
        At the end of the log, wait for more until its writer says END; False: stop.
    replay_rate : str or float
        "max"; "original" or 1.0: at the pace at which the records were written; 2.0: twice as fast, and so on.
    objects : bool
        Whether records may hold objects of any class. Unpickling them runs code that the file chooses: for logs that are
        trusted like programs. False: plain data only (numbers, texts, bytes, lists, tuples, dicts, sets, dates, arrays).
    on_damage : str
        What a damaged record does: "raise" CorruptedMessageError, or "skip" it, counted in `damaged`.
    stopped : threading.Event, optional
        Ends a wait.

    Attributes
    ----------
    sequence : int
        Of the next record.
    damaged : int
        Records or, where not even a length was to be had, ends of segments that were passed over.

    Raises
    ------
    LogError
        There is no log, or the group is in use.

    Notes
    -----
    Iterate over it for `LogRecord`s. For one thread. Nobody may cut the files of a log short but its writer.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        start: str | int = "earliest",
        group: str | None = None,
        follow: bool = False,
        replay_rate: str | float = "max",
        objects: bool = False,
        on_damage: str = "raise",
        stopped: threading.Event | None = None,
    ) -> None:
        self._path = os.path.abspath(os.fspath(path))
        rate = check_reader(self._path, start, group, follow, replay_rate)
        if on_damage not in ("raise", "skip"):
            raise PipelineBuildError(f"on_damage is {on_damage!r}, must be 'raise' or 'skip'")
        self._follow, self._objects, self._skips = bool(follow), bool(objects), on_damage == "skip"
        self._stopped = stopped or threading.Event()
        self._pace = None if rate is None else _Pace(rate, self._stopped)
        self._file = -1
        self._inode = -1
        self._segment = -1
        self._size = 0
        self._window: mmap.mmap | None = None
        self._window_start = 0
        self._at = 0
        self._start = start
        self._placed = False
        self.sequence = 0
        self.damaged = 0
        self._group = None if group is None else _Group(self._path, group)
        committed = None if self._group is None else self._group.committed
        if committed is not None:
            self.seek(committed)

    # --- where it stands ---

    def position(self) -> dict[str, int]:
        """Return where the next record stands."""
        self._place()
        return {"sequence": self.sequence, "segment": self._segment, "offset": self._at}

    def seek(self, position: Mapping[str, int] | int) -> None:
        """Go to a position, or to the record of a sequence.

        Raises
        ------
        LogError
            The log does not have that record, and will not: it begins later.
        CorruptedMessageError
            A record on the way there is damaged.
        """
        hint = position if isinstance(position, Mapping) else {}
        self._go_to(int(hint["sequence"] if isinstance(position, Mapping) else position), hint)
        self._placed = True

    def _place(self) -> None:
        """Go to where reading starts, when that is first asked for."""
        if self._placed:
            return
        start = self._start
        if start == "latest":
            self._go_to_end()
        else:
            first = min(self._there(), default=0)
            self._go_to(first if start == "earliest" else int(start), {})
        self._placed = True

    def _there(self) -> list[int]:
        try:
            return _segments(self._path)
        except FileNotFoundError:
            return []

    def _go_to(self, wanted: int, hint: Mapping[str, int]) -> None:
        segments = self._there()
        before = [first for first in segments if first <= wanted]
        self._leave()
        self.sequence = wanted
        if not before:
            if segments:
                raise LogError(
                    errno.ENOENT,
                    f"log {self._path!r} begins with record {segments[0]}, and {wanted} was asked for",
                )
            return  # opened when it is there
        self._open(before[-1])
        at, sequence = HEADER_BYTES, before[-1]
        offset = hint.get("offset", 0)
        if (
            hint.get("segment") == before[-1]
            and HEADER_BYTES <= offset <= self._size
            and offset % ALIGNMENT == 0
        ):
            header = self._header(offset)
            if header is not None and header.sequence == wanted:
                at, sequence = offset, wanted
        while sequence < wanted:
            header = self._header(at)
            if header is None or header.record_bytes > self._size - at:
                # The log was cut back, or is being written: this is where `wanted` will be.
                self._check_end(at, sequence)
                self._at, self.sequence = at, sequence
                self._pass_until(wanted)
                return
            at += header.record_bytes
            sequence += header.kind != END
        self._at = at

    def _pass_until(self, wanted: int) -> None:
        if not self._follow:
            raise LogError(
                errno.ENOENT,
                f"log {self._path!r} ends before record {self.sequence}, and {wanted} was asked for",
            )
        self._wanted = wanted

    _wanted = 0  # records before it are passed over: they were read before the log was cut back

    def _check_end(self, at: int, sequence: int) -> None:
        """Raise where what stands at an offset is no end of the written part, but damage."""
        if self._size - at >= HEADER_BYTES and self._header(at) is None and not self._zeros(at):
            raise self._damage(sequence, "has no header")

    def _go_to_end(self) -> None:
        segments = self._there()
        if not segments:
            return
        self._go_to(segments[-1], {})
        while (header := self._header(self._at)) is not None and header.record_bytes <= self._size - self._at:
            self._at += header.record_bytes
            self.sequence += header.kind != END

    # --- files ---

    def _open(self, first: int) -> None:
        path = _segment_path(self._path, first)
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _failed(self._path, "opening a segment", error) from error
        self._leave()
        self._file, self._segment, self._at = file, first, HEADER_BYTES
        status = os.fstat(file)
        self._inode, self._size = status.st_ino, status.st_size
        if _segment_uuid(os.pread(file, HEADER_BYTES, 0), first) is None:
            self._leave()
            raise LogError(
                errno.EINVAL,
                f"log {self._path!r}: {os.path.basename(path)} is no segment of this version, or damaged",
            )

    def _leave(self) -> None:
        self._window = None  # views of it live on
        if self._file >= 0:
            file, self._file, self._segment = self._file, -1, -1
            os.close(file)

    def _map(self, start: int, end: int) -> mmap.mmap:
        """Return a mapping of bytes start to end of the segment, which has them; `_window_start` is where it begins."""
        window = self._window
        if window is None or start < self._window_start or end > self._window_start + len(window):
            self._window_start = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
            last = min(self._size, max(end, self._window_start + _WINDOW_BYTES))
            window = self._window = mmap.mmap(
                self._file, last - self._window_start, access=mmap.ACCESS_READ, offset=self._window_start
            )
        return window

    def _header(self, at: int) -> Header | None:
        # Not through the mapping: what is not a whole record yet may be cut off at any time, and a page behind the end of a
        # file must not be touched.
        raw = os.pread(self._file, HEADER_BYTES, at)
        # As the file is with this header in it: a length seen before may be that of a record that was given up.
        self._size = os.fstat(self._file).st_size
        return read_header(raw) if len(raw) == HEADER_BYTES else None

    def _zeros(self, at: int) -> bool:
        """Whether nothing but zeros follow: a file whose length came to the disk before its contents."""
        return not os.pread(self._file, min(self._size - at, 1 << 20), at).strip(b"\0")

    # --- records ---

    def __iter__(self) -> Iterator[LogRecord]:
        pause = _POLLS[0]
        while not self._stopped.is_set():
            record = self.read()
            if record is None:
                if not self._follow or self._ended:
                    return
                self._stopped.wait(pause)
                pause = min(_POLLS[1], pause * 2)
                continue
            pause = _POLLS[0]
            if self._pace is not None and not self._pace.wait_for(record.timestamp_ns):
                self.seek(record.sequence)
                return
            yield record
            del record

    _ended = False  # an END was the last record

    def read(self) -> LogRecord | None:
        """Return the next record, or None at the end of what is written. Does not block.

        Raises
        ------
        CorruptedMessageError
            The record is damaged, and `on_damage` is "raise"; the reader stands before it.
        LogError
            A segment is missing or damaged.
        """
        self._place()
        while True:
            if self._file < 0 and not self._enter():
                return None
            record = self._read_here()
            if record is None and self._next_segment():
                continue
            if record is None or record.sequence >= self._wanted:
                return record

    def _enter(self) -> bool:
        """Open the segment that has the next record, where there is one."""
        before = [first for first in self._there() if first <= self.sequence]
        if not before:
            return False
        self._go_to(self.sequence, {})
        return True

    def _read_here(self) -> LogRecord | None:
        while True:
            header = self._header(self._at)
            if header is None:
                if self._size - self._at < HEADER_BYTES or self._zeros(self._at):
                    return None
                self._pass_over("has no header", self._size - self._at, 0)
                continue
            if header.record_bytes > self._size - self._at:
                return None  # being written, or torn
            problem = "" if header.sequence == self.sequence else f"says that it is {header.sequence}"
            record = None if problem else self._record(header)
            if record is None and header.kind == END and not problem:
                self._at += header.record_bytes
                self._ended = True
                continue
            if record is None:
                self._pass_over(problem or "has another sum than was written", header.record_bytes, 1)
                continue
            self._ended = False
            self._at += header.record_bytes
            self.sequence += 1
            return record

    def _record(self, header: Header) -> LogRecord | None:
        """The record here; None where it is an END, or damaged."""
        window = self._map(self._at, self._at + header.record_bytes)
        at = self._at - self._window_start
        view = memoryview(window)
        if (
            header.kind not in (BYTES, ARRAY, OBJECT, COLUMNS)
            or body_sum(view, at, header) != header.body_crc
        ):
            return None
        first = at + HEADER_BYTES
        try:
            _, parts = parts_of(bytes(view[first : first + header.description_bytes]))
        except (ValueError, struct.error, UnicodeDecodeError):
            return None
        if parts and parts[-1].offset + parts[-1].nbytes != header.payload_bytes:
            return None
        return LogRecord(header, parts, window, at + header.payload_offset, self._objects)

    def _pass_over(self, reason: str, nbytes: int, records: int) -> None:
        if not self._skips:
            raise self._damage(self.sequence, reason)
        self.damaged += 1
        self._at += nbytes
        self.sequence += records

    def _damage(self, sequence: int, reason: str) -> CorruptedMessageError:
        error = CorruptedMessageError(
            f"log {self._path!r}: record {sequence} in {os.path.basename(_segment_path(self._path, self._segment))} {reason}; "
            "on_damage='skip' passes it over"
        )
        error.sequence = sequence
        return error

    def _next_segment(self) -> bool:
        """Go on with the next segment, where there is one and this one has been read to its end."""
        if self._replaced():
            self._go_to(self.sequence, {})
            return True
        following = [first for first in self._there() if first > self._segment]
        if not following:
            return False
        # The next segment is made when nothing more comes into this one: what has come meanwhile is read first.
        header = self._header(self._at)
        if header is not None and header.record_bytes <= self._size - self._at:
            return True
        if following[0] != self.sequence:
            if not self._skips:
                raise LogError(
                    errno.EINVAL,
                    f"log {self._path!r}: records {self.sequence} to {following[0] - 1} are missing; on_damage='skip' goes on",
                )
            self.damaged += 1
        self.sequence = following[0]
        self._open(following[0])
        return True

    def _replaced(self) -> bool:
        """Whether the writer has cut the segment, which is another file now."""
        try:
            return os.stat(_segment_path(self._path, self._segment)).st_ino != self._inode
        except FileNotFoundError:
            return True  # with all that was in it: the log is shorter than what has been read

    # --- the group ---

    def commit(self, position: Mapping[str, int] | None = None) -> None:
        """Keep a position for the group, by default that of the next record; nothing without a group.

        Replaces the group's file at once, and writes it through to the disk.
        """
        if self._group is not None:
            self._group.commit(dict(position) if position is not None else self.position())

    def close(self) -> None:
        """End the reader. Items that it has given stay valid."""
        self._leave()
        if self._group is not None:
            self._group.close()

    def __del__(self) -> None:
        if hasattr(self, "_group"):
            self.close()


class _Group:
    """The committed position of a group: a file in the log's folder, and a lock as long as a reader has it."""

    def __init__(self, path: str, name: str) -> None:
        folder = os.path.join(path, "groups")
        self._lock = -1
        try:
            os.makedirs(folder, exist_ok=True)
            self._file = os.path.join(folder, name)
            self._lock = os.open(f"{self._file}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise LogError(
                errno.EAGAIN,
                f"group {name!r} of log {path!r} has a reader already; a group has one at a time",
            ) from None
        except OSError as error:
            self.close()
            raise _failed(path, f"group {name!r}", error) from error
        self.committed = self._read(path, name)

    def _read(self, path: str, name: str) -> dict[str, int] | None:
        try:
            with open(self._file, encoding="utf-8") as file:
                data = json.load(file)
            return {key: int(data[key]) for key in ("sequence", "segment", "offset")}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.close()
            raise LogError(
                errno.EINVAL,
                f"group {name!r} of log {path!r}: its file {self._file!r} cannot be read: {error}; remove it",
            ) from error

    def commit(self, position: dict[str, int]) -> None:
        _write_position(self._file, position)

    def close(self) -> None:
        if self._lock >= 0:
            lock, self._lock = self._lock, -1
            os.close(lock)


def _write_position(path: str, position: Mapping[str, int]) -> None:
    """Replace the file of a group, at once and on the disk."""
    temporary = f"{path}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(dict(position), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(os.path.dirname(path))


def commit_group(path: str | os.PathLike[str], group: str, position: Mapping[str, int]) -> None:
    """Keep a position for a group: for whoever knows that its reader's items are done, in the reader's process or another.

    Raises
    ------
    LogError
        The disk refuses.
    """
    folder = os.path.join(os.path.abspath(os.fspath(path)), "groups")
    try:
        os.makedirs(folder, exist_ok=True)
        _write_position(os.path.join(folder, group), position)
    except OSError as error:
        raise _failed(os.fspath(path), f"keeping the position of group {group!r}", error) from error


class _Pace:
    """Waits so that records come as far apart as they were written, divided by a factor."""

    def __init__(self, factor: float, stopped: threading.Event) -> None:
        self._factor = factor
        self._stopped = stopped
        self._first: tuple[float, int] | None = (
            None  # when the first record came, and when it had been written
        )

    def wait_for(self, timestamp_ns: int) -> bool:
        """Wait for a record's time. False when stopped meanwhile."""
        if self._first is None:
            self._first = time.monotonic(), timestamp_ns
        began, written = self._first
        delay = began + (timestamp_ns - written) / 1e9 / self._factor - time.monotonic()
        return not (delay > 0 and self._stopped.wait(min(delay, threading.TIMEOUT_MAX)))


# --- checks -------------------------------------------------------------------------------------------------------------


def parse_interval(value: Any) -> float:
    """Return seconds from "100ms", "2s" or a number of seconds; PipelineBuildError otherwise."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e6:
        return float(value)
    match = _INTERVAL.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None or float(match[1]) <= 0:
        raise PipelineBuildError(
            f"{value!r} is no span of time; give seconds above 0, or a text like '100ms' or '2s'"
        )
    return float(match[1]) * _UNITS[match[2]]


def check_writer(path: str, sync: Any, segment_bytes: Any) -> None:
    """Raise PipelineBuildError where a log cannot be written like that."""
    if sync is not None and sync != "always":
        parse_interval(sync)
    if (
        not isinstance(segment_bytes, int)
        or isinstance(segment_bytes, bool)
        or not 4096 <= segment_bytes <= MOST_BYTES
    ):
        raise PipelineBuildError(
            f"segment_bytes is {segment_bytes!r}, must be an int from 4096 to {MOST_BYTES}"
        )
    if "\0" in path:
        raise PipelineBuildError(f"path {path!r} holds a null character, which no file name can")
    if os.path.exists(path) and not os.path.isdir(path):
        raise PipelineBuildError(f"{path!r} is a file, and a log is a folder; give another path")
    parent = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(path) and not os.path.isdir(parent):
        raise PipelineBuildError(f"there is no folder {parent!r} for log {path!r}; make it first")


def check_reader(path: str, start: Any, group: Any, follow: Any, replay_rate: Any) -> float | None:
    """Return the factor of the rate, None for "max"; PipelineBuildError where a log cannot be read like that."""
    number = isinstance(start, int) and not isinstance(start, bool) and start >= 0
    if not number and start not in ("earliest", "latest"):
        raise PipelineBuildError(
            f"start is {start!r}, must be 'earliest', 'latest' or the sequence of a record"
        )
    if group is not None and (
        not isinstance(group, str)
        or _GROUP_NAME.fullmatch(group) is None
        or group.endswith((".lock", ".tmp"))
    ):
        raise PipelineBuildError(
            f"group is {group!r}, must be 1 to 100 of A-Z a-z 0-9 . _ - without a leading dot, and not end with .lock or .tmp"
        )
    if "\0" in path:
        raise PipelineBuildError(f"path {path!r} holds a null character, which no file name can")
    if not follow and not os.path.isdir(path):
        raise PipelineBuildError(f"there is no log {path!r}; follow=True waits for one")
    if os.path.isdir(path) and not _segments(path) and not follow:
        raise PipelineBuildError(f"folder {path!r} is no log: there is no segment in it")
    if replay_rate == "max":
        return None
    factor = 1.0 if replay_rate == "original" else replay_rate
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < float("inf"):
        raise PipelineBuildError(
            f"replay_rate is {replay_rate!r}, must be 'max', 'original' or a factor above 0"
        )
    return float(factor)


def log_schema(path: str | os.PathLike[str]) -> Schema:
    """Return what the items of a log are, judging by the first: dtypes, with any number of rows; None if there is none."""
    try:
        with LogReader(path) as reader:
            record = reader.read()
            schema = None if record is None else record.schema
    except (LogError, PipelineBuildError, CorruptedMessageError, SerializationError):
        return None
    if isinstance(schema, ArraySpec):
        return ArraySpec((None,) * schema.ndim, schema.dtype)
    return schema
