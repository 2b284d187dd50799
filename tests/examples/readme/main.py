# What the README's Python program calls its own; the program itself takes the place of the mark below.
import array
import ctypes
import sys

weights = array.array("f", bytes(4000))
step = array.array("Q", [0])


def check(library, status):
    if status != 0:
        why = ctypes.create_string_buffer(1024)
        library.pcc_last_error(why, ctypes.c_uint64(1024))
        sys.exit(why.value.decode())


def train(values, at):
    at[0] += 1
    for i in range(1000):
        values[i] += at[0] % 7 + i


@README@
print(f"step {step[0]}, sum {sum(weights):.0f}")
