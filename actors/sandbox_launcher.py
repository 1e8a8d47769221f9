"""The first thing that runs in a sandbox's process; see `actors.sandbox`. Run as a script; imports nothing of ours.

Reads the program and its limits from standard input, gives up the process's rights and runs the program. Tells the
pipe whose number it was given `isolated` or `held` once nothing more can be done, and the word it was told for the
end when the program has come to its end.
"""

import contextlib
import ctypes
import errno
import json
import math
import os
import platform
import resource
import struct
import sys
from typing import Any

_NEWIPC, _NEWUSER, _NEWNET = 0x08000000, 0x10000000, 0x40000000
_NO_NEW_PRIVS, _SECCOMP, _FILTER = 38, 22, 2
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
"""BPF: load a word of the call's data, compare, test bits, return."""
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_WRITING = 0o1 | 0o2 | 0o100 | 0o1000 | 0o20000000
"""O_WRONLY, O_RDWR, O_CREAT, O_TRUNC and the bit of O_TMPFILE."""
_THREAD = 0x00010000
_CALLS: dict[str, Any] = {
    "x86_64": {
        "audit": 0xC000003E,
        "denied": {
            "socket": 41, "socketpair": 53, "fork": 57, "vfork": 58, "execve": 59, "execveat": 322, "kill": 62,
            "tkill": 200, "tgkill": 234, "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297, "pidfd_open": 434,
            "pidfd_send_signal": 424, "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311,
            "rename": 82, "renameat": 264, "renameat2": 316, "unlink": 87, "unlinkat": 263, "rmdir": 84, "mkdir": 83,
            "mkdirat": 258, "link": 86, "linkat": 265, "symlink": 88, "symlinkat": 266, "mknod": 133, "mknodat": 259,
            "truncate": 76, "chmod": 90, "fchmod": 91, "fchmodat": 268, "fchmodat2": 452, "chown": 92, "fchown": 93,
            "lchown": 94, "fchownat": 260, "utime": 132, "utimes": 235, "utimensat": 280, "futimesat": 261,
            "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190, "removexattr": 197, "creat": 85, "mount": 165,
            "umount2": 166, "pivot_root": 155, "chroot": 161, "setns": 308, "unshare": 272, "mount_setattr": 442,
            "open_tree": 428, "move_mount": 429, "fsopen": 430, "bpf": 321, "keyctl": 250, "add_key": 248,
            "request_key": 249, "userfaultfd": 323, "perf_event_open": 298, "io_uring_setup": 425, "setpriority": 141,
            "sched_setscheduler": 144, "memfd_create": 319, "reboot": 169, "kexec_load": 246, "init_module": 175,
            "finit_module": 313, "shmget": 29, "msgget": 68, "semget": 64, "name_to_handle_at": 303,
            "open_by_handle_at": 304, "prlimit64": 302, "setrlimit": 160,
        },
        "absent": {"clone3": 435, "openat2": 437},
        "clone": 56, "open": 2, "openat": 257,
    },
    "aarch64": {
        "audit": 0xC00000B7,
        "denied": {
            "socket": 198, "socketpair": 199, "execve": 221, "execveat": 281, "kill": 129, "tkill": 130,
            "tgkill": 131, "rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240, "pidfd_open": 434,
            "pidfd_send_signal": 424, "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271,
            "renameat": 38, "renameat2": 276, "unlinkat": 35, "mkdirat": 34, "linkat": 37, "symlinkat": 36,
            "mknodat": 33, "truncate": 45, "fchmod": 52, "fchmodat": 53, "fchmodat2": 452, "fchown": 55,
            "fchownat": 54, "utimensat": 88, "setxattr": 5, "lsetxattr": 6, "fsetxattr": 7, "removexattr": 14,
            "mount": 40, "umount2": 39, "pivot_root": 41, "chroot": 51, "setns": 268, "unshare": 97,
            "mount_setattr": 442, "open_tree": 428, "move_mount": 429, "fsopen": 430, "bpf": 280, "keyctl": 219,
            "add_key": 217, "request_key": 218, "userfaultfd": 282, "perf_event_open": 241, "io_uring_setup": 425,
            "setpriority": 140, "sched_setscheduler": 119, "memfd_create": 279, "reboot": 142, "kexec_load": 104,
            "init_module": 105, "finit_module": 273, "shmget": 194, "msgget": 186, "semget": 190,
            "name_to_handle_at": 264, "open_by_handle_at": 265, "prlimit64": 261, "setrlimit": 164,
        },
        "absent": {"clone3": 435, "openat2": 437},
        "clone": 220, "openat": 56,
    },
}  # fmt: skip
"""Numbers of system calls. `absent` are answered as by a kernel that has none, so that libraries fall back on calls
whose arguments a filter can see."""


def limit(seconds: float, memory_bytes: int) -> None:
    """Bounds processor time, memory, the size of files, open files and core dumps."""
    for what, most in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))
    # The first limit ends a program with a signal that tells why; the second one cannot be caught.
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), math.ceil(seconds) + 1))


def isolate(libc: ctypes.CDLL) -> bool:
    """Whether the process is now in namespaces of its own; where the system does not allow it, all else still holds."""
    return bool(libc.unshare(_NEWUSER | _NEWNET | _NEWIPC) == 0)


def give_up_rights(libc: ctypes.CDLL) -> None:
    """Installs the filter, for this process for good. Raises `OSError` if the system has none."""
    calls = _CALLS[platform.machine()]
    instructions = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, calls["audit"]), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    if platform.machine() == "x86_64":
        # Calls of the x32 ABI have other numbers for the same things.
        instructions += [(0x35, 0, 1, 0x40000000), (_RETURN, 0, 0, _KILL)]
    for number in calls["denied"].values():
        instructions += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | errno.EPERM)]
    for number in calls["absent"].values():
        instructions += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    for name, argument in (("open", 1), ("openat", 2)):
        if name in calls:
            instructions += [
                (_EQUAL, 0, 4, calls[name]), (_LOAD, 0, 0, 16 + 8 * argument), (_ANY_BIT, 0, 1, _WRITING),
                (_RETURN, 0, 0, _ERRNO | errno.EPERM), (_RETURN, 0, 0, _ALLOW),
            ]  # fmt: skip
    instructions += [
        (_EQUAL, 0, 4, calls["clone"]), (_LOAD, 0, 0, 16), (_ANY_BIT, 1, 0, _THREAD),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM), (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ALLOW),
    ]  # fmt: skip
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in instructions))
    program = struct.pack("=H6xQ", len(instructions), ctypes.addressof(code))
    if libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(_SECCOMP, _FILTER, program, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


def main() -> None:
    """Runs the program; the exit code is the interpreter's own."""
    report = int(sys.argv[1])
    settings = json.load(sys.stdin)
    libc = ctypes.CDLL(None, use_errno=True)
    alone = isolate(libc)
    limit(settings["seconds"], settings["memory_bytes"])
    give_up_rights(libc)
    os.write(report, b"isolated\n" if alone else b"held\n")
    done = settings["done"]
    namespace = {"__name__": "__main__", "__builtins__": __builtins__}
    exec(compile(settings["source"], "<program>", "exec"), namespace)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os.write(report, done.encode())


main()
