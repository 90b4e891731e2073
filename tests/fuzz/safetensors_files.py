"""Safetensors files with spoiled headers: eight bytes of length, JSON, tensors."""

import struct

from hypothesis import strategies as st

from tests.fuzz.mutants import spoiled_bytes, spoiled_json

LENGTHS = [0, 1, 2, 7, 2**16, 10**8, 10**8 + 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
NUMBERS = ["-1", "0", "1", str(2**31), str(2**32), str(2**63 - 1), str(2**63), str(2**64 - 1), str(2**64), "1e3"]


def with_header(header: bytes, tensors: bytes, length: int | None = None) -> bytes:
    """A file of these parts, with the header's length or another one."""
    return struct.pack("<Q", len(header) if length is None else length) + header + tensors


def spoiled_safetensors(data: bytes) -> st.SearchStrategy[bytes]:
    """The header's values, its length, or any bytes are spoiled."""
    size = struct.unpack("<Q", data[:8])[0]
    header, tensors = data[8 : 8 + size], data[8 + size :]
    values = [*NUMBERS, "[]", "[0]", '"F4"', '"F8_E8M0"', '"BF16"', '"I64"', '"C64"', f"[{2**32},{2**32}]", "[0,0]"]
    headers = st.one_of(spoiled_json(header, values), spoiled_json(header), spoiled_bytes(header))
    return st.one_of(
        headers.map(lambda spoiled: with_header(spoiled, tensors)),
        # Without tensors behind, such as a file that was cut off.
        headers.map(lambda spoiled: with_header(spoiled, b"")),
        st.sampled_from(LENGTHS).map(lambda length: with_header(header, tensors, length)),
        spoiled_bytes(data),
    )


def named_tensors(count: int) -> bytes:
    """A header of so many empty tensors."""
    tensor = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return ("{" + ",".join(f'"t{n}":{tensor}' for n in range(count)) + "}").encode()
