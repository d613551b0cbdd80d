"""A network of the tests' own: loopback and nothing else, seen by nobody outside.

The real Milvus listens on every interface of its machine, whatever its settings say; in here there is only loopback.
Linux only; root is not needed where the system lets a user have namespaces.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import sys
from pathlib import Path

__all__ = ["enter_private_network"]

# Of linux/sched.h, linux/sockios.h and linux/if.h; Python 3.11 has no os.unshare.
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000
_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1
_IFREQ = "16sH22x"


def enter_private_network() -> None:
    """Move this process, and all that it starts from now on, into a new network with loopback up.

    There is no way back. Threads that are there already stay outside, so call it first. Raises OSError where the system
    does not allow it, and then nothing has changed.
    """
    if sys.platform != "linux":
        raise OSError(f"{sys.platform} has no network namespaces")
    if os.geteuid() == 0:
        _unshare(_CLONE_NEWNET)
    else:
        uid, gid = os.getuid(), os.getgid()
        _unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
        # In a user namespace we would be nobody; be who we were.
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        answer = fcntl.ioctl(any_socket, _SIOCGIFFLAGS, struct.pack(_IFREQ, b"lo", 0))
        flags = struct.unpack(_IFREQ, answer)[1]
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack(_IFREQ, b"lo", flags | _IFF_UP))


def _unshare(namespaces: int) -> None:
    if ctypes.CDLL(None, use_errno=True).unshare(namespaces) != 0:
        code = ctypes.get_errno()
        reason = os.strerror(code)
        # A user namespace wants a process without threads, and says EINVAL.
        raise OSError(
            code, f"no namespace of our own: {reason}; {len(list(Path('/proc/self/task').iterdir()))} threads run"
        )
