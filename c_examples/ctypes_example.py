#!/usr/bin/env python3
"""Save, wait, restore and handle errors from Python, with nothing but its standard library.

    python3 ctypes_example.py FILE [LIBRARY]       LIBRARY is libpccheck.so.1 unless given

The structs below are those of pccheck.h, field by field. `state` holds array.array; a numpy array or a CPU tensor of
torch works the same way: what counts is the address of its first byte and its size (`a.ctypes.data`, `t.data_ptr()`).
"""

import array
import ctypes
import sys
from ctypes import POINTER, byref, c_char_p, c_int32, c_int64, c_uint32, c_uint64, c_void_p

OK, ALREADY_EXISTS, NOT_FOUND = 0, -4, -3
ABI_MAJOR = 1
DTYPES = {"B": 2, "i": 7, "q": 9, "f": 12, "d": 13}  # array's type codes -> PCC_DTYPE_...


class Tensor(ctypes.Structure):
    """pcc_tensor"""

    _fields_ = [
        ("struct_bytes", c_uint64),
        ("name", c_char_p),
        ("shape", POINTER(c_uint64)),
        ("data", c_void_p),
        ("bytes", c_uint64),
        ("dtype", c_uint32),
        ("rank", c_uint32),
        ("device", c_uint32),
        ("device_index", c_uint32),
    ]


class Pair(ctypes.Structure):
    """pcc_pair"""

    _fields_ = [("key", c_char_p), ("value", c_char_p)]


class CheckpointInfo(ctypes.Structure):
    """pcc_checkpoint_info"""

    _fields_ = [
        ("struct_bytes", c_uint64),
        ("generation", c_uint64),
        ("step", c_uint64),
        ("run_id", c_uint64),
        ("payload_bytes", c_uint64),
        ("chunk_bytes", c_uint64),
        ("unix_ns", c_uint64),
        ("slot", c_uint32),
        ("tensor_count", c_uint32),
        ("flags", c_uint32),
        ("pinned", c_uint32),
        ("readers", c_uint32),
        ("rejected", c_uint32),
    ]


class Error(Exception):
    """A call failed; `status` is the pcc_status, the text says why and what to do."""

    def __init__(self, status, text):
        super().__init__(text)
        self.status = status


class Library:
    """The functions that this program uses, with their types: without them ctypes passes every number as an int."""

    SIGNATURES = {
        "pcc_format": (c_char_p, c_uint32, c_uint64, c_void_p),
        "pcc_open": (c_char_p, c_void_p, POINTER(c_void_p)),
        "pcc_drain": (c_void_p, c_int64),
        "pcc_payload_bytes": (POINTER(Tensor), c_uint64, POINTER(Pair), c_uint64, POINTER(c_uint64)),
        "pcc_save_begin": (
            c_void_p, c_uint64, POINTER(Tensor), c_uint64, POINTER(Pair), c_uint64, c_void_p, POINTER(c_void_p),
        ),
        "pcc_save_wait_copied": (c_void_p, c_int64),
        "pcc_save_wait_durable": (c_void_p, c_int64, c_void_p),
        "pcc_restore": (c_void_p, c_void_p, POINTER(Tensor), c_uint64, POINTER(c_void_p)),
        "pcc_checkpoint_get_info": (c_void_p, POINTER(CheckpointInfo)),
        "pcc_checkpoint_metadata_find": (c_void_p, c_char_p, POINTER(c_char_p), POINTER(c_uint64)),
    }  # fmt: skip

    def __init__(self, file):
        self.library = ctypes.CDLL(file)
        self.library.pcc_abi_version.restype = c_uint32
        abi = self.library.pcc_abi_version()
        if abi >> 16 != ABI_MAJOR:
            raise OSError(f"{file} has ABI {abi >> 16}.{abi & 0xFFFF}, expected {ABI_MAJOR}")
        self.library.pcc_last_error.argtypes = (c_void_p, c_uint64)
        self.library.pcc_last_error.restype = c_uint64
        for name, arguments in self.SIGNATURES.items():
            function = getattr(self.library, name)
            function.argtypes, function.restype = arguments, c_int32
        for name in ("pcc_close", "pcc_save_free", "pcc_checkpoint_close"):
            function = getattr(self.library, name)
            function.argtypes, function.restype = (c_void_p,), None

    def __getattr__(self, name):
        """`library.save_begin(...)` calls pcc_save_begin and raises Error where it fails."""
        function = getattr(self.library, f"pcc_{name}")

        def call(*arguments):
            status = function(*arguments)
            if status not in (OK, None):
                text = ctypes.create_string_buffer(1024)
                self.library.pcc_last_error(text, len(text))
                raise Error(status, text.value.decode())

        return call


def describe(state):
    """An array of pcc_tensor for a dict of arrays. It refers to their memory: keep both while a save copies."""
    tensors = (Tensor * len(state))()
    for tensor, (name, values) in zip(tensors, state.items()):
        address, length = values.buffer_info()
        tensor.struct_bytes = ctypes.sizeof(Tensor)
        tensor.name = name.encode()
        tensor.shape = (c_uint64 * 1)(length)
        tensor.data = address
        tensor.bytes = length * values.itemsize
        tensor.dtype = DTYPES[values.typecode]
        tensor.rank = 1
    return tensors


def train(state, step):
    """A training step, for this example: all of the state depends on the step."""
    for i in range(len(state["weights"])):
        state["weights"][i] = step + i / 8
    state["rng"][0] = step * 6364136223846793005 % 2**63


def new_state():
    return {"weights": array.array("f", bytes(4 * 10_000)), "rng": array.array("q", [0])}


def main(path, file):
    library = Library(file)

    # Errors are exceptions that say what was wrong, and where.
    store = c_void_p()
    try:
        library.open(b"/nonexistent/region", None, byref(store))
    except Error as error:
        assert error.status == NOT_FOUND, error.status
        print(f"as expected: {error}")

    state = new_state()
    tensors = describe(state)
    metadata = (Pair * 1)(Pair(b"note", "größer".encode()))
    payload_bytes = c_uint64()
    library.payload_bytes(tensors, len(tensors), metadata, 1, byref(payload_bytes))
    try:
        library.format(path.encode(), 3, payload_bytes, None)
    except Error as error:
        if error.status != ALREADY_EXISTS:  # left by an earlier run: use it
            raise
    library.open(path.encode(), None, byref(store))
    try:
        for step in range(1, 6):
            train(state, step)
            save = c_void_p()
            library.save_begin(store, step, tensors, len(tensors), metadata, 1, None, byref(save))
            try:
                library.save_wait_copied(save, -1)  # ctypes lets other Python threads run meanwhile
                # From here on the state may change; the save goes on to durable by itself.
                if step == 5:
                    library.save_wait_durable(save, -1, None)
            finally:
                library.save_free(save)
        library.drain(store, -1)

        # Restore into fresh arrays of the same shapes.
        restored = new_state()
        wanted = describe(restored)
        checkpoint = c_void_p()
        library.restore(store, None, wanted, len(wanted), byref(checkpoint))
        try:
            info = CheckpointInfo(struct_bytes=ctypes.sizeof(CheckpointInfo))
            library.checkpoint_get_info(checkpoint, byref(info))
            note = c_char_p()
            library.checkpoint_metadata_find(checkpoint, b"note", byref(note), None)
            print(f"restored step {info.step}, note {note.value.decode()}")
        finally:
            library.checkpoint_close(checkpoint)
        assert info.step == 5 and restored == state, "what was restored is not what was saved"

        # A tensor of the wrong size is refused before anything is written to it.
        short = describe({"weights": array.array("f", [0.0])})
        try:
            library.restore(store, None, short, 1, None)
        except Error as error:
            print(f"as expected: {error}")
        else:
            raise AssertionError("a tensor of the wrong size was restored")
    finally:
        library.close(store)
    print("every value is as it was saved")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: ctypes_example.py FILE [LIBRARY]")
    try:
        main(sys.argv[1], sys.argv[2] if len(sys.argv) == 3 else "libpccheck.so.1")
    except (Error, OSError) as error:
        sys.exit(f"ctypes_example: {error}")
