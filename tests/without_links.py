"""Runs a command for which the kernel refuses every hard link, as on a FAT file system: `without_links.py cdp ...`.

A seccomp filter holds for the command and all its children.
"""

import ctypes
import errno
import os
import platform
import struct
import sys

_LINK_CALLS = {"x86_64": (86, 265), "aarch64": (37, 37)}
"""Numbers of the system calls link and linkat."""
SUPPORTED = sys.platform == "linux" and platform.machine() in _LINK_CALLS
_SET_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def refuse_links() -> None:
    """For this process and its children, from now on."""
    first, second = _LINK_CALLS[platform.machine()]
    instructions = [
        (_LOAD, 0, 0, 0),
        (_EQUAL, 2, 0, first),
        (_EQUAL, 1, 0, second),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
    ]
    packed = b"".join(struct.pack("HBBI", *each) for each in instructions)
    data = ctypes.create_string_buffer(packed)
    program = _Program(len(instructions), ctypes.addressof(data))
    libc = ctypes.CDLL(None, use_errno=True)
    for call in ((_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0), (_SET_SECCOMP, _FILTER, ctypes.byref(program), 0, 0)):
        if libc.prctl(*call):
            raise OSError(ctypes.get_errno(), "no seccomp filter here")


if __name__ == "__main__":
    refuse_links()
    os.execvp(sys.argv[1], sys.argv[1:])
