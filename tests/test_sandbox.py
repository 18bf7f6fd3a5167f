"""The sandbox against programs that mean harm: each ends in time, the parent lives, nothing is left running or written, layer by layer."""

import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

import pytest

from opd_jax.environments import sandbox
from opd_jax.environments.sandbox import Limits

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the layers under test are Linux's")

QUICK = Limits(cpu_seconds=1, wall_seconds=5.0, memory_bytes=2**28, disk_bytes=2**20, output_bytes=2**16)
ACTIVE = sandbox.active_layers() if sys.platform == "linux" else ()
VISIBLE = {"tmp", "own", "dev", "etc", "bin", "lib", "lib64", "usr", sys.base_prefix.split("/")[1]}
# Each set of layers is a machine that this one can stand for.
MACHINES = {
    "all": ACTIVE,
    "no namespaces": sandbox.choose(["user", "landlock", "seccomp"]),
    "no namespaces, no Landlock": sandbox.choose(["seccomp"]),
    "no seccomp": tuple(layer for layer in ACTIVE if layer != "seccomp"),
    "nothing": (),
}
# Limits do not depend on the layers.
of_limits = pytest.mark.parametrize("machine", ["all", "nothing"], indirect=True)
of_kernel = pytest.mark.parametrize("machine", [name for name in MACHINES if name != "nothing"], indirect=True)


@pytest.fixture(params=MACHINES)
def machine(request):
    if request.param != "nothing" and not MACHINES[request.param]:
        pytest.skip("this kernel has none of these layers")
    return request.param


@pytest.fixture
def run(machine, tmp_path, monkeypatch):
    """Runs a program and looks at what it leaves: processes whose command line names the folder of this test, and files in it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def run(program, **changes):
        start = time.monotonic()
        result = sandbox.run(program, layers=MACHINES[machine], **({"limits": QUICK} | changes))
        assert time.monotonic() - start < 9
        assert not processes_of(tmp_path) and not list(tmp_path.iterdir())
        return result

    return run


def processes_of(folder) -> list[str]:
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue  # it ended meanwhile
    return found


@of_limits
def test_output_input_and_status(run):
    assert run("print(sum(map(int, input().split())))", stdin="1 2 3").stdout == "6\n"
    result = run("import sys\nprint('out')\nprint('err', file=sys.stderr)\nraise ValueError('no')")
    assert (result.status, result.exit_code, result.stdout) == ("error", 1, "out\n")
    assert result.stderr == 'err\nTraceback (most recent call last):\n  File "<program>", line 4, in <module>\nValueError: no\n'
    assert run("raise SystemExit(3)").exit_code == 3
    assert run("this is no program").stderr.endswith("SyntaxError: invalid syntax\n")
    assert run("class A: pass\nprint(__name__, A.__module__, __import__('sys').argv)").stdout == "__main__ __main__ ['program']\n"
    assert run("print('\\ud800 é')").stdout == "\\ud800 é\n"


@of_limits
def test_what_comes_then_goes_on_in_the_same_module(run):
    later = "print(x, __name__)\nx += 'é'"
    assert run("x = 'a'", then=(later, later)).stdout == "a __main__\naé __main__\n"
    assert run("import sys; sys.exit(0)", then=("print('later')",)).stdout == ""
    result = run("def f(): 1/0", then=("print(1)\nf()", "print(2)"))
    assert (result.status, result.stdout) == ("error", "1\n")
    assert [line for line in result.stderr.splitlines() if "File" in line] == [
        '  File "<then 1>", line 2, in <module>',
        '  File "<program>", line 1, in f',
    ]


@of_limits
def test_the_same_program_prints_the_same_set(run):
    program = "print({str(i) for i in range(50)}, hash('a'))"
    assert run(program).stdout == run(program).stdout


def test_threads_work(run, machine):
    program = "import threading\nt = threading.Thread(target=print, args=('ran',))\nt.start(); t.join()"
    if machine == "no seccomp":  # there new processes are refused by a limit that counts threads too
        assert run(program).status == "error"
    else:
        assert run(program).stdout == "ran\n"


@of_limits
def test_the_environment_is_empty(run, monkeypatch):
    monkeypatch.setenv("OPD_JAX_TEST_SECRET", "hunter2")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    assert set(eval(run("import os\nprint(sorted(os.environ))").stdout)) <= {
        "LC_CTYPE",
        "PYTHONDONTWRITEBYTECODE",
        "PYTHONHASHSEED",
        "PYTHONIOENCODING",
    }
    assert run("import numpy").stderr.endswith("ModuleNotFoundError: No module named 'numpy'\n")


@of_limits
@pytest.mark.parametrize("program", ["while True: pass", "9**9**9"])
def test_endless_work_stops_at_the_cpu_limit(run, program):
    assert run(program).status == "timeout"


@of_limits
def test_waiting_stops_at_the_wall_clock(run):
    result = run("import time\nprint('began', flush=True)\ntime.sleep(100)", limits=Limits(wall_seconds=1.0))
    assert (result.status, result.stdout, result.exit_code) == ("timeout", "began\n", None) and result.seconds < 3


@of_limits
def test_closed_outputs_do_not_hide_a_program(run):
    assert run("import os\nos.close(1); os.close(2)\nwhile True: pass", limits=Limits(wall_seconds=1.0)).status == "timeout"


@pytest.mark.parametrize("machine", ["all"], indirect=True)
def test_a_program_may_not_ignore_the_cpu_limit(run):
    result = run("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass")
    assert result.status == "timeout" or result.exit_code == 128 + 9  # a busy machine may reach the wall clock first


@of_limits
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_endless_output_is_cut(run, stream):
    result = run(f"import sys\nwhile True: sys.{stream}.write('x' * 10**5)")
    assert result.status == "output" and len(getattr(result, stream)) == QUICK.output_bytes


@of_limits
@pytest.mark.parametrize("program", ["x = bytearray(10**10)", "x = []\nwhile True: x.append(bytearray(10**6))"])
def test_memory_is_bounded(run, program):
    result = run(program)
    assert result.status == "error" and "MemoryError" in result.stderr


def test_files_are_bounded(run, machine):
    result = run("with open('big', 'wb') as f:\n    while True: f.write(b'x' * 10**5)")
    assert result.status == "error" and ("File too large" in result.stderr or "No space left" in result.stderr)
    if machine == "all" and "private root" in ACTIVE:  # all files together, too
        result = run("for i in range(100):\n    with open(str(i), 'wb') as f: f.write(b'x' * 10**5)")
        assert "No space left" in result.stderr
    assert "Too many open files" in run("import os\nfor i in range(100): os.open('f', os.O_CREAT)").stderr


# Memory that outlives its mapping, and so is not counted by the limit on address space; the objects are shared by the whole machine, too.
SHARED_MEMORY = {
    "shmget": "l.shmget(0, 4096, 0o1600)",
    "shmat": "l.shmat(-1, None, 0)",
    "shmctl": "l.shmctl(-1, 0, None)",
    "msgget": "l.msgget(0, 0o1600)",
    "msgsnd": "l.msgsnd(-1, b'x' * 16, 1, 0)",
    "msgrcv": "l.msgrcv(-1, None, 0, 0, 0)",
    "msgctl": "l.msgctl(-1, 0, None)",
    "semget": "l.semget(0, 1, 0o1600)",
    "semop": "l.semop(-1, b'x' * 16, 1)",
    "semctl": "l.semctl(-1, 0, 0)",
    "mq_open": "l.mq_open(b'/opd_jax', 0o102, 0o600, None)",
    "mq_unlink": "l.mq_unlink(b'/opd_jax')",
    "memfd_create": "l.memfd_create(b'x', 0)",
    "memfd_secret": "l.syscall(447, 0)",
    "vmsplice": "l.vmsplice(-1, None, 0, 0)",
    "pidfd_getfd": "l.syscall(438, -1, 0, 0)",
}
# Those that the C library has no name for, or makes another call of: semop, add_key, request_key.
UNNAMED = {"x86_64": (65, 248, 249), "aarch64": (193, 217, 218)}.get(platform.machine(), ())
SHARED_MEMORY |= {str(number): f"l.syscall({number}, -1, 0, 0)" for number in UNNAMED}


@pytest.mark.parametrize("machine", ["all", "no namespaces", "no namespaces, no Landlock"], indirect=True)
def test_no_memory_that_is_not_counted(run, machine):
    if "seccomp" not in MACHINES[machine]:
        pytest.skip("this machine has no seccomp; capabilities() says what that means")
    program = "import ctypes\nl = ctypes.CDLL(None, use_errno=True)\n"
    program += "\n".join(f"print({name!r}, {call}, ctypes.get_errno())" for name, call in SHARED_MEMORY.items())
    # EPERM, where wrong arguments alone would be EINVAL, EBADF or ENOENT; the C library makes EACCES of it for mq_unlink
    refused = [f"{name} -1 {13 if name == 'mq_unlink' else 1}" for name in SHARED_MEMORY]
    assert run(program).stdout.splitlines() == refused
    fill = "import ctypes\nl = ctypes.CDLL(None)\nl.shmat.restype = ctypes.c_void_p\nfor i in range(32):\n"
    fill += "    a = l.shmat(l.shmget(0, 2**24, 0o1600), None, 0)\n    ctypes.memset(a, 1, 2**24)\n    l.shmdt(ctypes.c_void_p(a))"
    before = pathlib.Path("/proc/sysvipc/shm").read_text()
    assert run(fill).status == "error"
    assert pathlib.Path("/proc/sysvipc/shm").read_text() == before


@of_limits
def test_pages_that_a_pipe_holds_are_few(run):
    """Pipes are the memory that remains outside of the limit: fewer than `open_files`, of at most a mebibyte each."""
    program = "import fcntl, os\nends = []\ntry:\n    while True: ends.append(os.pipe())\nexcept OSError: print(len(ends))\n"
    program += "try: print(fcntl.fcntl(ends[0][1], fcntl.F_SETPIPE_SZ, 2**21))\nexcept OSError: print('refused')"
    count, size = run(program).stdout.split()
    assert int(count) <= QUICK.open_files // 2
    assert size == "refused" or os.geteuid() == 0 and "user" not in ACTIVE


@pytest.mark.parametrize("machine", ["all", "no namespaces"], indirect=True)
def test_threads_are_bounded(run, machine):
    """The kernel's memory for each one is not in the address space."""
    if not {"user", "seccomp"} <= set(MACHINES[machine]):
        pytest.skip("the limit counts all that the user runs, so it needs a user of its own")
    program = "import threading\nthreading.stack_size(2**15)\nstay, n = threading.Event(), 0\ntry:\n"
    program += "    while n < 2000: threading.Thread(target=stay.wait, daemon=True).start(); n += 1\n"
    program += "except RuntimeError: pass\nprint(n, flush=True)\nimport os\nos._exit(0)"
    result = run(program, limits=Limits(memory_bytes=2**33))
    assert 100 < int(result.stdout) <= 256


@pytest.mark.skipif("private root" not in ACTIVE, reason="this machine permits no private root")
@pytest.mark.parametrize("machine", ["all"], indirect=True)
def test_empty_files_are_bounded(run):
    result = run("for i in range(20000): open(str(i), 'x').close()")
    assert "No space left" in result.stderr


def test_the_input_cannot_be_written(run):
    """A file of the parent's, outside of the limit on the program's own."""
    assert "Bad file descriptor" in run("import os\nos.write(0, b'x')", stdin="given").stderr


FORKS = {
    "bomb": "import os, time\nfor _ in range(8):\n    try: os.fork()\n    except OSError: continue\n    print('forked')\n0/0",
    "one": "import os\nos.fork()",
    "shell": "import os\nexit(os.system('true'))",
    "subprocess": "import subprocess, sys\nsubprocess.run([sys.executable, '-c', ''])",
    "daemon": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(60)\n    os._exit(0)\nos.wait()",
}


@pytest.mark.parametrize("name", FORKS)
def test_no_new_processes(run, name):
    """Nothing is left running whatever it tries (the fixture looks), and the attempt itself fails."""
    result = run(FORKS[name])
    assert result.status == "error" and "forked" not in result.stdout


@of_kernel
@pytest.mark.parametrize("call", ["l.fork()", "l.vfork()"])
def test_no_new_processes_behind_the_back_of_the_interpreter(run, call):
    assert run(f"import ctypes\nl = ctypes.CDLL(None)\nprint({call})").stdout == "-1\n"


def test_a_program_cannot_leave_its_group_behind(run):
    program = "import os\ntry: os.setsid()\nexcept OSError: pass\nimport time\ntime.sleep(60)"
    assert run(program, limits=Limits(wall_seconds=1.0)).status == "timeout"


def test_no_network(run, machine):
    """Neither to a server on this machine nor to an address elsewhere, whichever library asks."""
    import http.server

    with http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as answer:
            assert answer.status == 200
        result = run(f"import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}/', timeout=2)")
        raw = f"import ctypes\nl = ctypes.CDLL(None)\ns = l.socket(2, 1, 0)\na = (2).to_bytes(2, 'little') + ({port}).to_bytes(2, 'big')"
        raw += " + bytes([127, 0, 0, 1]) + bytes(8)\nprint(l.connect(s, a, 16))"
        if machine != "nothing":
            assert run(raw).stdout == "-1\n"
        server.shutdown()
    assert result.status == "error" and "Error" in result.stderr
    assert run("import socket\nsocket.create_connection(('192.0.2.1', 80), timeout=1)").status == "error"


def test_other_processes_cannot_be_signalled(run, machine):
    """By number and by group. Aimed at are a process of this test and, with signal 0, which does nothing, the parent."""
    bystander = subprocess.Popen(["sleep", "60"], start_new_session=True)
    program = "import os\nfor call, who, number in (%s):\n    try: call(who, number)\n"
    program += "    except OSError as error: print(type(error).__name__)"
    aims = [f"(os.kill, {bystander.pid}, 9)", f"(os.killpg, {bystander.pid}, 9)", f"(os.kill, {os.getpid()}, 0)"]
    try:
        result = run(program % ", ".join(aims))
        assert len(result.stdout.split()) == 3 and set(result.stdout.split()) <= {"PermissionError", "ProcessLookupError"}
        raw = f"import ctypes\nl = ctypes.CDLL(None)\nprint(l.kill({bystander.pid}, 9), l.kill({os.getpid()}, 0))"
        if machine != "nothing":
            assert run(raw).stdout == "-1 -1\n"
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_files_elsewhere_are_safe(run, machine, tmp_path_factory):
    """A file of this user is neither changed nor removed; behind a private root or Landlock it cannot even be read."""
    folder = tmp_path_factory.mktemp("mine")
    secret = folder / "secret"
    secret.write_text("hunter2")
    secret.chmod(0o600)
    attempts = [f"open({str(secret)!r}, 'w')", f"os.remove({str(secret)!r})", f"shutil.rmtree({str(folder)!r})", "open('/usr/x', 'w')"]
    if "private root" in MACHINES[machine] or "landlock" in MACHINES[machine] or "user" in MACHINES[machine]:
        for attempt in [*attempts, f"print(open({str(secret)!r}).read())"]:
            result = run(f"import os, shutil\n{attempt}")
            assert result.status == "error" and "hunter2" not in result.stdout, attempt
        assert secret.read_text() == "hunter2" and not os.path.exists("/usr/x")
    assert run("import pathlib, tempfile\npathlib.Path('a').write_text('b')\nprint(open('a').read())").stdout == "b\n"


@of_limits
def test_the_limits_cannot_be_raised(run):
    program = "import resource\ntry: resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))\nexcept ValueError: print('refused')"
    assert run(program).stdout == "refused\n"


@of_limits
@pytest.mark.parametrize(
    "program, signal_number",
    [
        ("import ctypes\nctypes.string_at(0)", 11),
        ("import sys\nsys.setrecursionlimit(10**9)\nf = lambda _: sorted('1', key=f)\nf(0)", None),
        ("import os\nos.abort()", None),
    ],
)
def test_crashes_are_errors(run, program, signal_number):
    result = run(program)
    assert result.status == "error" and result.exit_code > 0
    assert signal_number is None or result.exit_code == 128 + signal_number


@of_limits
def test_deep_recursion_is_an_exception(run):
    assert "RecursionError" in run("def f(): return f()\nf()").stderr
    assert run("(" * 10**4).status == "error"


@pytest.mark.skipif("private root" not in ACTIVE, reason="this machine permits no private root")
@pytest.mark.parametrize("machine", ["all", "no seccomp"], indirect=True)
def test_escapes_from_the_private_root_fail(run):
    assert run("import os\nos.chroot('/own')").status == "error"
    assert run("import ctypes\nprint(ctypes.CDLL(None).mount(b'x', b'/own', b'tmpfs', 0, None))").stdout == "-1\n"
    assert run("import ctypes\nprint(ctypes.CDLL(None).unshare(0x10000000), ctypes.CDLL(None).umount2(b'/own', 2))").stdout in (
        "-1 -1\n",
        "0 -1\n",
    )
    assert run("import os\nos.mknod('/own/disk', 0o60600, os.makedev(8, 0))").status == "error"
    assert set(run("import os\nprint(*os.listdir('/'))").stdout.split()) <= VISIBLE


@pytest.mark.skipif("private root" not in ACTIVE, reason="this machine permits no private root")
def test_the_private_root_holds_by_itself():
    """Without the layers that would refuse the same: the system is read-only, and the rights to change that are gone."""
    alone = ("namespaces", "private root")
    for attempt in ("open('/usr/x', 'w')", "open('/x', 'w')", "os.mknod('/own/disk', 0o60600, os.makedev(8, 0))", "os.chroot('/own')"):
        assert sandbox.run(f"import os\n{attempt}", layers=alone).status == "error", attempt
    assert sandbox.run("import ctypes\nprint(ctypes.CDLL(None).umount2(b'/own', 2))", layers=alone).stdout == "-1\n"
    assert not os.path.exists("/usr/x")


def test_many_at_once():
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: sandbox.run(f"print({i})"), range(24)))
    assert [result.stdout for result in results] == [f"{i}\n" for i in range(24)]


def test_capabilities_say_what_holds():
    values = sandbox.capabilities()
    assert set(values) == {"network", "processes", "signals", "files", "memory", "time, output"}
    assert sandbox._describe(("namespaces", "private root", "seccomp"))["files"] == "private root"
    nothing = sandbox._describe(())
    assert all(value.startswith("weak") for name, value in nothing.items() if name != "time, output")
    assert sandbox._describe(("namespaces", "private root", "user"))["memory"].startswith("weak: limit on the mappings of each process")
    assert sandbox._describe(("seccomp",))["memory"] == "seccomp"


def test_a_weak_machine_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(sandbox, "_holds", lambda layers: layers[-1] == "seccomp")
    sandbox.active_layers.cache_clear()
    assert sandbox.active_layers() == sandbox.active_layers() == ("seccomp",)
    sandbox.active_layers.cache_clear()
    assert [record.message.split(" (")[0] for record in caplog.records] == [
        "programs run in a sandbox that this machine cannot close fully"
    ]
    assert "files: weak" in caplog.text


def test_a_sandbox_that_cannot_be_set_up_stops_the_program(monkeypatch):
    with pytest.raises(sandbox.SandboxError, match="cannot be set up"):
        sandbox.run("print('ran')", limits=Limits(disk_bytes=-5))
    for layers in (("private root",), ("namespaces", "walls")):
        with pytest.raises(ValueError, match="layers"):
            sandbox.run("print('ran')", layers=layers)


def test_an_ordinary_user_has_a_sandbox_too(tmp_path):
    """The same files, run by a user without rights, by an interpreter that this user may read."""
    if os.geteuid() != 0:
        pytest.skip("every other test here is one of an ordinary user already")
    folder = pathlib.Path(tempfile.mkdtemp(prefix="opd_jax_user_", dir="/tmp"))
    try:
        folder.chmod(0o755)
        for name in ("sandbox.py", "inside.py"):
            shutil.copy(sandbox.INSIDE.with_name(name), folder)
            (folder / name).chmod(0o644)
        code = "import sandbox\nprint(sandbox.active_layers())\nr = sandbox.run('print(1)'); assert r.stdout == '1\\n', r\n"
        code += "for p in ('import os\\nos.fork()', 'import socket\\nsocket.create_connection((\"192.0.2.1\", 80), timeout=1)',"
        code += ' \'open("/tmp/x" + "yz" * 9 + "/../outside", "w")\'):\n    r = sandbox.run(p); assert r.status == \'error\', r\n'
        for interpreter in dict.fromkeys([os.path.realpath(sys.executable), "/usr/bin/python3"]):
            try:
                done = subprocess.run(
                    [interpreter, "-c", code], cwd=folder, user=12345, group=12345, extra_groups=[], env={}, capture_output=True, text=True
                )
            except OSError:
                continue  # not readable for this user
            if "Python path configuration" not in done.stderr:
                assert done.returncode == 0, done.stderr
                return
        pytest.skip("no interpreter here can be read by an ordinary user")
    finally:
        shutil.rmtree(folder)
