"""Runs one program inside the sandbox. `sandbox.run` starts this file as a script; nothing imports it; it needs the standard library alone.

Three processes: this one stays outside; the first of the new namespaces ends all others when it ends; the program runs in the third. Every
layer that was asked for must succeed, otherwise the program does not start.
"""

import ctypes
import json
import os
import platform
import resource
import signal
import sys
import traceback
import types

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (1 << i for i in (17, 26, 27, 28, 29, 30))
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
MNT_DETACH, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 2, -100, 0x8000, 1
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
MOUNT_SETATTR, LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 442, 444, 445, 446  # numbers that are the same on all machines
LANDLOCK_READ, LANDLOCK_ALL = 1 | 4 | 8, (1 << 13) - 1  # execute, read a file, list a folder; everything that the first version knows
SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache")  # what the interpreter's shared libraries need
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
SOME_USER = 1_900_000_000  # plus a process id: a user that owns nothing, and that no two programs share

# Per machine: its audit number, then the numbers of the system calls that are refused, or looked at, below.
MACHINES = {
    "x86_64": {"arch": 0xC000003E, "pivot_root": 155, "capset": 126, "clone": 56}
    | {"socket": 41, "fork": 57, "vfork": 58, "execve": 59, "execveat": 322, "setsid": 112, "setpgid": 109, "ptrace": 101}
    | {"process_vm_readv": 310, "process_vm_writev": 311, "unshare": 272, "setns": 308, "mount": 165, "keyctl": 250, "bpf": 321}
    | {"perf_event_open": 298, "userfaultfd": 323, "kill": 62, "tkill": 200, "tgkill": 234}
    | {"shmget": 29, "shmat": 30, "shmctl": 31, "semget": 64, "semop": 65, "semctl": 66, "semtimedop": 220, "msgget": 68, "msgsnd": 69}
    | {"msgrcv": 70, "msgctl": 71, "mq_open": 240, "mq_unlink": 241, "memfd_create": 319, "vmsplice": 278, "add_key": 248}
    | {"request_key": 249},
    "aarch64": {"arch": 0xC00000B7, "pivot_root": 41, "capset": 91, "clone": 220}
    | {"socket": 198, "execve": 221, "execveat": 281, "setsid": 157, "setpgid": 154, "ptrace": 117}
    | {"process_vm_readv": 270, "process_vm_writev": 271, "unshare": 97, "setns": 268, "mount": 40, "keyctl": 219, "bpf": 280}
    | {"perf_event_open": 241, "userfaultfd": 282, "kill": 129, "tkill": 130, "tgkill": 131}
    | {"shmget": 194, "shmat": 196, "shmctl": 195, "semget": 190, "semop": 193, "semctl": 191, "semtimedop": 192, "msgget": 186}
    | {"msgsnd": 189, "msgrcv": 188, "msgctl": 187, "mq_open": 180, "mq_unlink": 181, "memfd_create": 279, "vmsplice": 75}
    | {"add_key": 217, "request_key": 218},
}
SAME = {"io_uring_setup": 425, "pidfd_send_signal": 424, "pidfd_getfd": 438, "memfd_secret": 447}
MACHINES = {name: calls | SAME for name, calls in MACHINES.items()}
SIGNALS = {"kill", "tkill", "tgkill", "pidfd_send_signal"}  # harmless where the program sees no process but its own
NOT_REFUSED = {"arch", "pivot_root", "capset", "clone"}
MOST_THREADS, MOST_FILES = 256, 10_000  # each takes some kilobytes of the kernel's memory, which is in no address space
CLONE3, CLONE_THREAD, EPERM, ENOSYS = 435, 0x10000, 1, 38

libc = ctypes.CDLL(None, use_errno=True)


def checked(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def syscall(number: int, *arguments) -> int:
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return checked(libc.syscall(ctypes.c_long(number), *wide), f"system call {number}")


def mount(source, target, kind, flags: int, data=None) -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind, data)]
    checked(libc.mount(*encoded[:3], ctypes.c_ulong(flags), encoded[3]), f"mount on {target}")


def make_read_only(path: str, flags: int = AT_RECURSIVE) -> None:
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, 0, 0)
    syscall(MOUNT_SETATTR, AT_FDCWD, ctypes.c_char_p(path.encode()), flags, attributes, ctypes.sizeof(attributes))


def enter_namespaces() -> None:
    """New process, network, mount and IPC namespaces, for root by right, for other users within a user namespace of their own."""
    flags = CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS
    if os.geteuid() == 0 and libc.unshare(flags) == 0:
        return
    user, group = os.geteuid(), os.getegid()
    checked(libc.unshare(flags | CLONE_NEWUSER), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"1000 {user} 1"), ("gid_map", f"1000 {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def enter_private_root(root: str, disk_bytes: int) -> None:
    """A root of its own: the interpreter and the system's libraries, read-only, and an empty /own in memory. All else is out of sight."""
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for source in dict.fromkeys([*SYSTEM, sys.base_prefix, sys.base_exec_prefix, *DEVICES]):
        target = root + source
        if os.path.islink(source) and source in SYSTEM:
            os.symlink(os.readlink(source), target)
        elif os.path.exists(source) and not os.path.exists(target):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.mkdir(target) if os.path.isdir(source) else open(target, "x").close()
            mount(source, target, None, MS_BIND | MS_REC)
            if source not in DEVICES:
                make_read_only(target)
    os.mkdir(root + "/own")
    mount("tmpfs", root + "/own", "tmpfs", MS_NOSUID | MS_NODEV, f"size={disk_bytes},nr_inodes={MOST_FILES},mode=700")
    os.symlink("/own", root + "/tmp")
    make_read_only(root, 0)
    os.chdir(root)
    syscall(MACHINES[platform.machine()]["pivot_root"], ctypes.c_char_p(b"."), ctypes.c_char_p(b"."))
    checked(libc.umount2(b".", MNT_DETACH), "umount of the old root")
    os.chdir("/own")


def restrict_files() -> None:
    """Landlock: reads of the interpreter and the system's libraries, anything below the working directory, nothing elsewhere."""
    handled = ctypes.c_uint64(LANDLOCK_ALL)
    ruleset = syscall(LANDLOCK_CREATE, ctypes.byref(handled), ctypes.sizeof(handled), 0)
    rules = [(path, LANDLOCK_READ) for path in (*SYSTEM, sys.base_prefix, sys.base_exec_prefix)]
    for path, rights in [*rules, *((path, 2 | 4) for path in DEVICES), (os.getcwd(), LANDLOCK_ALL)]:
        if os.path.exists(path):
            below = os.open(path, os.O_PATH)
            rights = rights if os.path.isdir(path) else rights & (1 | 2 | 4)
            packed = rights.to_bytes(8, sys.byteorder) + below.to_bytes(4, sys.byteorder)
            syscall(LANDLOCK_ADD, ruleset, 1, ctypes.c_char_p(packed), 0)
            os.close(below)
    checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    syscall(LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)


def become_nobody(number: int) -> None:
    """From root to a user that owns nothing but the working directory."""
    for user in (SOME_USER + number, 65534):
        try:
            os.chown(".", user, user)
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            return
        except OSError as error:  # a container may map few users
            failure = error
    raise failure


def drop_capabilities() -> None:
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    syscall(MACHINES[platform.machine()]["capset"], header, none)


def set_limits(limits: dict, processes: int | None) -> None:
    """`processes`: how many more the user may have, threads included; None: as before."""
    wanted = {
        "RLIMIT_CPU": (limits["cpu_seconds"], limits["cpu_seconds"] + 1),
        "RLIMIT_AS": (limits["memory_bytes"],) * 2,
        "RLIMIT_FSIZE": (limits["disk_bytes"],) * 2,
        "RLIMIT_NOFILE": (limits["open_files"],) * 2,
        "RLIMIT_CORE": (0, 0),
    } | ({} if processes is None else {"RLIMIT_NPROC": (processes, processes)})
    for name, (soft, hard) in wanted.items():
        ceiling = resource.getrlimit(getattr(resource, name))[1]
        ceiling = hard if ceiling == resource.RLIM_INFINITY else min(hard, ceiling)
        try:
            resource.setrlimit(getattr(resource, name), (min(soft, ceiling), ceiling))
        except (ValueError, OSError):
            if sys.platform == "linux":  # elsewhere some limits exist in name only
                raise


def filter_system_calls(refuse_signals: bool) -> None:
    """No new processes (threads are fine), programs, sockets, sessions; no looking into other processes; no memory that stays after it is
    unmapped, which no limit counts (System V, memfd, pages given to a pipe). Inherited, and never lifted."""
    calls = MACHINES[platform.machine()]
    refused = [calls[name] for name in sorted(calls.keys() - NOT_REFUSED) if refuse_signals or name not in SIGNALS]
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    deny, allow = 0x00050000 | EPERM, 0x7FFF0000
    program = [(load, 0, 0, 4), (equal, 1, 0, calls["arch"]), (give, 0, 0, deny)]
    program += [(load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (give, 0, 0, deny)]  # the x32 numbers are other names for the same calls
    for number in refused:
        program += [(equal, 0, 1, number), (give, 0, 0, deny)]
    program += [(equal, 0, 1, CLONE3), (give, 0, 0, 0x00050000 | ENOSYS)]  # its flags cannot be read here; libraries fall back to clone
    program += [(equal, 0, 3, calls["clone"]), (load, 0, 0, 16), (any_bit, 1, 0, CLONE_THREAD), (give, 0, 0, deny)]
    program += [(give, 0, 0, allow)]
    packed = b"".join(c.to_bytes(2, sys.byteorder) + bytes([t, f]) + k.to_bytes(4, sys.byteorder) for c, t, f, k in program)
    code = ctypes.create_string_buffer(packed, len(packed))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

    checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    checked(libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(Program(len(program), ctypes.addressof(code))), 0, 0), "seccomp")


def refuse_by_audit_hook() -> None:
    """Where the kernel offers nothing: Python's own calls are refused. A program that means harm gets around this."""

    def hook(event: str, arguments: tuple) -> None:
        if event.startswith(("socket.", "subprocess.", "os.fork", "os.exec", "os.spawn", "os.posix_spawn", "os.system", "os.kill", "pty.")):
            raise PermissionError(f"{event} is refused in the sandbox")

    sys.addaudithook(hook)


def end_with_parent() -> None:
    if sys.platform == "linux":
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def run_program(rest: int, sizes: list[int]) -> None:
    """As `__main__`, with a traceback that begins in the program. Each text is read from the descriptor `rest` when its turn comes, so that
    no variable, constant or frame has it before."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv = ["program"]
    try:
        for index, size in enumerate(sizes):
            name = f"<then {index}>" if index else "<program>"
            exec(compile(os.read(rest, size).decode("utf-8", "surrogatepass"), name, "exec"), module.__dict__)
    except Exception as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next
        traceback.print_exception(type(error), error, trace)
        sys.exit(1)


def prepare(spec: dict, ready: int) -> None:
    layers = spec["layers"]
    namespaces = "namespaces" in layers
    if "private root" not in layers:
        os.chdir(spec["work"])
    if "user" in layers:
        become_nobody(spec["number"])
    if "landlock" in layers:
        restrict_files()
    if sys.platform == "linux" and platform.machine() in MACHINES:
        drop_capabilities()
    end_with_parent()
    # seccomp refuses processes but not threads; their limit counts all that the user runs, so it needs a user of its own
    threads = MOST_THREADS if "user" in layers else None
    set_limits(spec["limits"], processes=threads if "seccomp" in layers else 0)
    if "seccomp" in layers:
        filter_system_calls(refuse_signals=not namespaces)
    elif not namespaces:
        refuse_by_audit_hook()
    os.write(ready, b"ready")
    os.close(ready)


def fork_and_wait() -> bool:
    """True in the child. The parent waits for it, ends it when asked to end, and exits with its status."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        end_with_parent()
        return True
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        ended, status = os.wait()
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def main() -> None:
    path, ready, rest = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with open(path) as file:
        spec = json.load(file)
    os.unlink(path)
    spec["number"] = os.getpid()
    if "namespaces" in spec["layers"]:
        enter_namespaces()
        if fork_and_wait() and "private root" in spec["layers"]:
            enter_private_root(spec["root"], spec["limits"]["disk_bytes"])
    if fork_and_wait():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        prepare(spec, ready)
        run_program(rest, spec["sizes"])


main()
