"""Saves in flight."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from . import arrays, errors
from ._abi import Handle, check, ffi, lib, new_struct, text_of, wait

__all__ = ["Durable", "Progress", "RawSave", "Save"]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a save is, in bytes of its payload."""

    total_bytes: int
    #: bytes that have left the caller's memory
    copied_bytes: int
    #: bytes handed to the medium, not yet durable
    written_bytes: int
    #: every byte has left the caller's memory
    copied: bool
    #: the save has ended, durably or not
    ended: bool


@dataclass(frozen=True, slots=True)
class Durable:
    """What is known of a durable save."""

    generation: int
    step: int
    #: the newer generation that had made this one superfluous by then; None: it is kept
    superseded_by: int | None
    #: seconds from begin to copied
    copied_seconds: float
    #: seconds from begin to durable
    durable_seconds: float
    #: slot that it was written to
    slot: int


class Save:
    """One save: begun -> copied -> durable (or failed, or cancelled). Made by :meth:`pccheck.Store.save`.

    It goes on by itself whether or not anybody waits; only a save that was begun with ``confirm=True`` needs
    :meth:`confirm`, and is cancelled when this object goes away without it. The arrays that are saved are referenced
    until they are copied. All methods may be called from any thread; ``await save`` gives what :meth:`durable` gives.
    """

    def __init__(self, pointer: Any, owners: Any, path: str) -> None:
        self._handle = Handle("save", pointer, self._free)
        # Released once they are copied; the library reads them until then.
        self._owners = owners
        self._path = path
        progress = self._progress()
        self.generation: int = progress.generation
        self.step: int = progress.step

    @staticmethod
    def _free(pointer: Any) -> None:
        # Arrays may go once this object does: a save that still reads them would read freed memory.
        lib.pcc_save_wait_copied(pointer, -1)
        lib.pcc_save_free(pointer)

    def _progress(self) -> Any:
        progress = new_struct("pcc_progress")
        with self._handle.use() as save:
            check(lib.pcc_save_progress(save, progress))
        return progress

    def copied(self, timeout: float | None = None) -> None:
        """Waits until every byte has left the arrays: they may change again. Not yet durable.

        Args:
            timeout: seconds; None waits for ever, 0 only looks.

        Raises:
            TimedOut: it goes on, and the arrays must still not change.
            PccheckError: why the save failed; the arrays may change again.
        """
        try:
            with self._handle.use() as save:
                wait(lambda ms: int(lib.pcc_save_wait_copied(save, ms)), timeout)
        except errors.TimedOut:
            raise
        except errors.PccheckError as why:
            self._owners = None
            raise self._failure(why) from None
        self._owners = None

    def durable(self, timeout: float | None = None) -> Durable:
        """Waits until the checkpoint will be found after a crash of the kind that the store's durability names.

        Args:
            timeout: seconds; None waits for ever, 0 only looks.

        Raises:
            TimedOut: it goes on.
            PccheckError: why the save failed; earlier checkpoints are intact.
        """
        found = new_struct("pcc_durable")
        try:
            with self._handle.use() as save:
                wait(lambda ms: int(lib.pcc_save_wait_durable(save, ms, found)), timeout)
        except errors.TimedOut:
            raise
        except errors.PccheckError as why:
            self._owners = None
            raise self._failure(why) from None
        self._owners = None
        return Durable(
            generation=found.generation,
            step=self.step,
            superseded_by=found.superseded_by or None,
            copied_seconds=found.copied_ns / 1e9,
            durable_seconds=found.durable_ns / 1e9,
            slot=found.slot,
        )

    def progress(self) -> Progress:
        """How far it is, without waiting."""
        p = self._progress()
        return Progress(p.total_bytes, p.copied_bytes, p.written_bytes, bool(p.copied), bool(p.ended))

    def done(self) -> bool:
        """True when it has ended, durably or not."""
        return bool(self._progress().ended)

    def error(self) -> str | None:
        """Why it failed; None where it has not (yet)."""
        with self._handle.use() as save:
            return text_of(lambda buffer, size: int(lib.pcc_save_error(save, buffer, size))) or None

    def confirm(self) -> None:
        """Lets a save that was begun with ``confirm=True`` become durable. Other saves need none.

        Raises:
            PccheckError: why the save has failed.
        """
        with self._handle.use() as save:
            check(lib.pcc_save_confirm(save))

    def cancel(self) -> None:
        """Gives the save up, unless it is already durable or being committed. Returns at once: wait for its end."""
        with self._handle.use() as save:
            check(lib.pcc_save_cancel(save))

    def close(self) -> None:
        """Frees the handle after waiting until the save is copied. The save goes on, but for one unconfirmed."""
        self._handle.close()
        self._owners = None

    def _failure(self, why: errors.PccheckError) -> errors.PccheckError:
        why.path = why.path or self._path
        return why

    def fileno(self) -> int:
        """Readable when the save has ended, for ``select`` and event loops; do not close it."""
        fd = ffi.new("int32_t *")
        with self._handle.use() as save:
            check(lib.pcc_save_event_fd(save, fd))
        return int(fd[0])

    def __await__(self) -> Generator[Any, None, Durable]:
        return self._ended().__await__()

    async def _ended(self) -> Durable:
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        fd = self.fileno()
        # Several tasks may await one save, and a loop knows one reader per descriptor.
        own = os.dup(fd)
        loop.add_reader(own, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(own)
            os.close(own)
        return self.durable(0)

    def __repr__(self) -> str:
        if self._handle.closed:
            return f"<pccheck.Save step={self.step} generation={self.generation} closed>"
        p = self.progress()
        state = ("failed" if self.error() else "durable") if p.ended else ("copied" if p.copied else "copying")
        return f"<pccheck.Save step={self.step} generation={self.generation} {state}>"


class RawSave:
    """A save whose bytes the caller makes: stored as one tensor of bytes, called "raw".

    Made by :meth:`pccheck.Store.raw_save`. Leaving a ``with`` block without :meth:`commit` cancels it.
    """

    def __init__(self, pointer: Any, path: str) -> None:
        self._handle = Handle("raw save", pointer, lib.pcc_raw_free)
        self._path = path

    def write_at(self, offset: int, data: Any) -> None:
        """Copies the bytes of an array or buffer to ``offset`` of the stream; they may change again on return.

        Each byte is written once, in any order, by any threads. Blocks while the staging pool is full.
        """
        memory = arrays.memory_of(data, f"raw bytes at {offset}")
        if not 0 <= offset < 2**64:
            raise errors.InvalidArgument(f"offset={offset}: expected a byte offset")
        with self._handle.use() as raw:
            check(lib.pcc_raw_write(raw, offset, ffi.cast("void *", memory.address), memory.nbytes))

    def commit(self) -> Save:
        """Lets the save commit once every byte is written; wait for the returned :class:`Save`."""
        out = ffi.new("pcc_save **")
        with self._handle.use() as raw:
            check(lib.pcc_raw_commit(raw, out))
        return Save(out[0], None, self._path)

    def close(self) -> None:
        """Cancels it, unless it was committed."""
        self._handle.close()

    def __enter__(self) -> RawSave:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
