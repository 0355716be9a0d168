"""Where checkpoints are kept: a folder of complete ones, of which the newest counts."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import threading
import time
import weakref
from collections.abc import Mapping
from typing import Any, Final, NoReturn

from dsline._core import crc32c
from dsline.dataflow.npy_files import sync_folder
from dsline.errors import PipelineBuildError, PipelineRuntimeError

__all__ = ["Manifest", "Store"]

_NAME: Final = re.compile(r"checkpoint-([0-9]{10})")
_TEMPORARY: Final = "begun-"
_MANIFEST: Final = "manifest.json"
_FORMAT: Final = 1
_KEPT: Final = 2


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A complete checkpoint.

    Attributes
    ----------
    number : int
        Of the marker that went through the pipeline.
    fingerprint : str
        Of the plan.
    states : dict of str to bytes
        By segment, as they were given to `save`.
    time_ns : int
        When it was saved, as `time.time_ns()`.
    """

    number: int
    fingerprint: str
    states: dict[str, bytes]
    time_ns: int


class Store:
    """The checkpoints in a folder.

    Parameters
    ----------
    directory : str or path
        Made where it is not there.

    Raises
    ------
    PipelineBuildError
        It cannot be made or written to, another process has it, or something else is in it.

    Notes
    -----
    A checkpoint is a folder that gets its name when all that is in it is on the disk: whatever ends the process, the last
    complete one is there. The two newest are kept. States are whatever bytes they were given as; a runtime that keeps pickles
    in them has to trust the folder.

    One process at a time; within it, all stores of a folder share the lock. Safe to share between threads.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = os.path.realpath(os.fspath(directory))
        self._mutex = threading.Lock()
        try:
            os.makedirs(self._directory, exist_ok=True)
            first = _lock(self._directory)
            weakref.finalize(self, _unlock, self._directory)
            if first:  # another store of this process may be saving
                self._sweep()
        except OSError as error:
            raise PipelineBuildError(
                f"checkpoints cannot be kept in {self._directory!r}: {error.strerror or error}"
            ) from error

    def _sweep(self) -> None:
        """Remove what was not complete when its process ended."""
        for name in os.listdir(self._directory):
            if name.startswith(_TEMPORARY):
                shutil.rmtree(os.path.join(self._directory, name), ignore_errors=True)
            elif name != "lock" and _NAME.fullmatch(name) is None:
                raise PipelineBuildError(
                    f"folder {self._directory!r} is none of checkpoints: it holds {name!r}; give a folder of its own"
                )

    def _ordinals(self) -> list[int]:
        """Of the checkpoints, the oldest first. They grow over all runs, unlike the numbers of markers."""
        matches = (_NAME.fullmatch(name) for name in os.listdir(self._directory))
        return sorted(int(match[1]) for match in matches if match)

    def _path(self, ordinal: int) -> str:
        return os.path.join(self._directory, f"checkpoint-{ordinal:010}")

    def save(self, number: int, fingerprint: str, states: Mapping[str, bytes]) -> None:
        """Keep a checkpoint; it counts from the moment when this returns. Blocks until it is on the disk.

        Raises
        ------
        PipelineRuntimeError
            The disk refuses; the checkpoint before stays the newest.
        """
        with self._mutex:
            temporary = os.path.join(self._directory, f"{_TEMPORARY}{secrets.token_hex(8)}")
            try:
                os.mkdir(temporary)
                self._write(temporary, number, fingerprint, states)
                ordinals = self._ordinals()
                os.rename(temporary, self._path(ordinals[-1] + 1 if ordinals else 0))
                sync_folder(self._directory)
            except OSError as error:
                shutil.rmtree(temporary, ignore_errors=True)
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                raise PipelineRuntimeError(
                    f"checkpoint {number} cannot be written to {self._directory!r}: "
                    f"{'no space is left on the disk' if full else error.strerror or error}; the one before it stays"
                ) from error
            for old in ordinals[: max(0, len(ordinals) + 1 - _KEPT)]:
                shutil.rmtree(self._path(old), ignore_errors=True)

    def _write(self, folder: str, number: int, fingerprint: str, states: Mapping[str, bytes]) -> None:
        files = []
        for index, (name, state) in enumerate(states.items()):
            _write_through(os.path.join(folder, f"{index}.state"), state)
            files.append({"segment": name, "bytes": len(state), "crc32c": crc32c(state)})
        content = {
            "format": _FORMAT,
            "number": number,
            "fingerprint": fingerprint,
            "time_ns": time.time_ns(),
            "states": files,
        }
        text = json.dumps(content).encode()
        _write_through(
            os.path.join(folder, _MANIFEST), json.dumps({"crc32c": crc32c(text)}).encode() + b"\n" + text
        )
        sync_folder(folder)

    def newest(self, fingerprint: str | None = None) -> Manifest | None:
        """Return the newest checkpoint that is whole; None where there is none. Reads all of it.

        Raises
        ------
        PipelineBuildError
            It is one of another plan than the one of `fingerprint`.
        """
        with self._mutex:
            for ordinal in reversed(self._ordinals()):
                try:
                    found = _read(self._path(ordinal))
                except (OSError, ValueError, KeyError, TypeError):
                    continue  # damaged, or half removed
                if fingerprint is not None and found.fingerprint != fingerprint:
                    raise PipelineBuildError(
                        f"the checkpoint in {self._directory!r} is one of another pipeline: stages, options or functions were "
                        "changed since; run without resume=True, or give another folder"
                    )
                return found
        return None

    def clear(self) -> None:
        """Remove all checkpoints: a run that begins anew must not be resumed from those of an older one."""
        with self._mutex:
            for ordinal in reversed(self._ordinals()):
                # Not a checkpoint any more before it is half gone.
                gone = os.path.join(self._directory, f"{_TEMPORARY}{secrets.token_hex(8)}")
                os.rename(self._path(ordinal), gone)
                shutil.rmtree(gone, ignore_errors=True)
            sync_folder(self._directory)


def _write_through(path: str, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _read(folder: str) -> Manifest:
    """Read a checkpoint; ValueError where it is not as it was written."""
    with open(os.path.join(folder, _MANIFEST), "rb") as file:
        check, _, text = file.read().partition(b"\n")
    if json.loads(check)["crc32c"] != crc32c(text):
        raise ValueError("the manifest is damaged")
    content: dict[str, Any] = json.loads(text)
    if content["format"] != _FORMAT:
        raise ValueError(f"format {content['format']}")
    states = {}
    for index, entry in enumerate(content["states"]):
        with open(os.path.join(folder, f"{index}.state"), "rb") as file:
            state = file.read()
        if len(state) != entry["bytes"] or crc32c(state) != entry["crc32c"]:
            raise ValueError(f"the state of {entry['segment']} is damaged")
        states[entry["segment"]] = state
    return Manifest(content["number"], content["fingerprint"], states, content["time_ns"])


# One lock per folder and process, as long as a store of it is alive.
_locks: dict[str, tuple[int, int]] = {}  # descriptor and number of stores
_locks_mutex = threading.Lock()


def _lock(directory: str) -> bool:
    """Take the lock; whether this process did not have it."""
    with _locks_mutex:
        if directory in _locks:
            descriptor, users = _locks[directory]
            _locks[directory] = descriptor, users + 1
            return False
        path = os.path.join(directory, "lock")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace")
            os.close(descriptor)
            if error.errno == errno.EWOULDBLOCK:
                _in_use(directory, holder)
            raise
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        _locks[directory] = descriptor, 1
        return True


def _in_use(directory: str, holder: str) -> NoReturn:
    raise PipelineBuildError(
        f"process {holder or 'unknown'} keeps its checkpoints in {directory!r}; give every run a folder of its own"
    ) from None


def _unlock(directory: str) -> None:
    with _locks_mutex:
        descriptor, users = _locks[directory]
        if users > 1:
            _locks[directory] = descriptor, users - 1
            return
        del _locks[directory]
    with contextlib.suppress(OSError):
        os.close(descriptor)
