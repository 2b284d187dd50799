"""Saves in flight."""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from . import arrays, errors, streams
from ._abi import Handle, check, ffi, lib, new_struct, text_of, whole

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

    def __init__(
        self, handle: Handle, store: Handle, path: str, unconfirmed: bool = False, gpus: tuple[int, ...] = ()
    ) -> None:
        # It keeps the arrays until they are copied.
        self._handle = handle
        # A store that nobody closed stays open as long as it has saves whose end nobody has seen.
        self._store: Handle | None = store
        self._path = path
        self._unconfirmed = unconfirmed
        #: CUDA devices that hold some of the tensors
        self.gpus = gpus
        progress = self._progress()
        self.generation: int = progress.generation
        self.step: int = progress.step

    @staticmethod
    def handle(owners: Any) -> Handle:
        """For the library to store a save's pointer in; ``owners`` keep alive what it reads."""
        return Handle("pcc_save", _free, owners)

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
        self._wait(lambda save, ms: int(lib.pcc_save_wait_copied(save, ms)), timeout)

    def stream_wait_copied(self, stream: Any = None, timeout: float | None = None) -> None:
        """Makes a CUDA stream wait until every byte has left the tensors: what is enqueued on it after this may update
        them.

        The calling thread waits only until all copies are enqueued: hardly at all where the state went into spare
        memory of the GPU or finds room in the staging pool, and has no thousands of tensors, of which the driver would
        not take all copies at once; and until arrays in host memory are copied. The tensors stay referenced until they
        are copied.

        Args:
            stream: a ``torch.cuda.Stream`` or the number of a CUDA stream; None: torch's current streams of all devices
                that hold some of the tensors.
            timeout: seconds; None waits for ever.

        Raises:
            TimedOut: it goes on, and the tensors must still not change.
            PccheckError: why the save failed; the tensors may change again.
        """
        handles = [streams.of_device(gpu, stream) for gpu in self.gpus[: None if stream is None else 1]]
        if not handles:
            return self.copied(timeout)
        for handle in handles:
            call = functools.partial(_stream_wait, ffi.cast("void *", handle))
            self._wait(call, timeout, keeps=True)
        return None

    def durable(self, timeout: float | None = None) -> Durable:
        """Waits until the checkpoint will be found after a crash of the kind that the store's durability names.

        Args:
            timeout: seconds; None waits for ever, 0 only looks.

        Raises:
            TimedOut: it goes on.
            PccheckError: why the save failed; earlier checkpoints are intact.
        """
        found = new_struct("pcc_durable")
        self._wait(lambda save, ms: int(lib.pcc_save_wait_durable(save, ms, found)), timeout, ends=True)
        return Durable(
            generation=found.generation,
            step=self.step,
            superseded_by=found.superseded_by or None,
            copied_seconds=found.copied_ns / 1e9,
            durable_seconds=found.durable_ns / 1e9,
            slot=found.slot,
        )

    def _wait(
        self, call: Callable[[Any, int], int], timeout: float | None, ends: bool = False, keeps: bool = False
    ) -> None:
        def slice_(save: Any, milliseconds: int) -> int:
            status = call(save, milliseconds)
            if not keeps and status not in (lib.PCC_TIMED_OUT, lib.PCC_FORKED, lib.PCC_BAD_POINTER):
                # Nothing reads the arrays any more, however the save goes on.
                self._handle.keep = None
                if ends:
                    self._store = None
            return status

        try:
            self._handle.wait(slice_, timeout)
        except errors.PccheckError as why:
            why.path = why.path or self._path
            raise

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

    def awaits_confirmation(self) -> bool:
        """True where all is written, and only :meth:`confirm` is missing."""
        try:
            now = self._progress()
        except errors.InvalidState:
            return False
        return self._unconfirmed and not now.ended and bool(now.written_bytes == now.total_bytes)

    def confirm(self) -> None:
        """Lets a save that was begun with ``confirm=True`` become durable. Other saves need none.

        Raises:
            PccheckError: why the save has failed.
        """
        with self._handle.use() as save:
            check(lib.pcc_save_confirm(save))
        self._unconfirmed = False

    def cancel_unconfirmed(self) -> None:
        """Gives the save up where nobody has confirmed it."""
        if self._unconfirmed:
            with suppress(errors.InvalidState):
                self.cancel()

    def cancel(self) -> None:
        """Gives the save up, unless it is already durable or being committed. Returns at once: wait for its end."""
        with self._handle.use() as save:
            check(lib.pcc_save_cancel(save))

    @property
    def closed(self) -> bool:
        """True after :meth:`close`."""
        return self._handle.closed

    def close(self) -> None:
        """Frees the handle after waiting until the save is copied. The save goes on, but for one unconfirmed."""
        # Here Ctrl-C can end the wait, which it cannot while the handle is freed.
        with suppress(errors.PccheckError):
            self.copied()
        self._handle.close()
        self._store = None

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
        # Several tasks may await one save, and a loop knows one reader per descriptor.
        own = os.dup(self.fileno())
        try:
            loop.add_reader(own, ended.set)
            await ended.wait()
        finally:
            loop.remove_reader(own)
            os.close(own)
        return self.durable(0)

    def __repr__(self) -> str:
        try:
            p = self.progress()
            state = ("failed" if self.error() else "durable") if p.ended else ("copied" if p.copied else "copying")
        except errors.PccheckError as why:
            state = type(why).__name__ if isinstance(why, errors.Forked) else "closed"
        return f"<pccheck.Save step={self.step} generation={self.generation} {state}>"


def _stream_wait(stream: Any, save: Any, milliseconds: int) -> int:
    return int(lib.pcc_save_stream_wait_copied(save, stream, milliseconds))


def _free(pointer: Any) -> None:
    # One that is not copied would be cancelled; the arrays may go once it is freed.
    lib.pcc_save_wait_copied(pointer, -1)
    lib.pcc_save_free(pointer)


class RawSave:
    """A save whose bytes the caller makes: stored as one tensor of bytes, called "raw".

    Made by :meth:`pccheck.Store.raw_save`. Leaving a ``with`` block without :meth:`commit` cancels it.
    """

    def __init__(self, handle: Handle, store: Handle, path: str) -> None:
        self._handle = handle
        self._store = store
        self._path = path

    @staticmethod
    def handle() -> Handle:
        """For the library to store a raw save's pointer in."""
        return Handle("pcc_raw", lib.pcc_raw_free)

    def write_at(self, offset: int, data: Any) -> None:
        """Copies the bytes of an array or buffer to ``offset`` of the stream; they may change again on return.

        Each byte is written once, in any order, by any threads. Blocks while the staging pool is full, for as long as
        the save's timeout says; Ctrl-C works only afterwards.
        """
        offset = whole("offset", offset)
        memory = arrays.memory_of(data, f"raw bytes at {offset}")
        with self._handle.use() as raw:
            check(lib.pcc_raw_write(raw, offset, ffi.cast("void *", memory.address), memory.nbytes))

    def commit(self) -> Save:
        """Lets the save commit: every byte must have been written. Wait for the returned :class:`Save`.

        Raises:
            InvalidState: bytes are missing, which may still be written; or it was committed before.
        """
        save = Save.handle(None)
        # The library allows no other call meanwhile.
        with self._handle.alone() as raw:
            check(lib.pcc_raw_commit(raw, save.out))
        return Save(save, self._store, self._path)

    def close(self) -> None:
        """Cancels it, unless it was committed."""
        self._handle.close()

    def __enter__(self) -> RawSave:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
