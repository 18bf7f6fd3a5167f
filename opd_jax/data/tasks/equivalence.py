"""Whether two mathematical answers are the same: math-verify, in a process that may be killed.

What a model writes may ask for 9^(9^(9^9)), which no signal interrupts and no memory holds. Run as a program this file is that process:
pairs of answers come in as JSON lines, true or false goes out.
"""

import atexit
import json
import pathlib
import select
import subprocess
import sys
import threading

SECONDS = 8.0  # per pair; the library gives up by itself after LIBRARY_SECONDS where it can
LIBRARY_SECONDS = 3
MEMORY = 4 * 2**30  # bytes of address space


class Judge:
    """Compares answers in a process of its own, which is started when first needed and again after it had to be killed."""

    def __init__(self, seconds: float = SECONDS):
        self._seconds = seconds
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()
        atexit.register(self.close)

    def equivalent(self, reference: str, answer: str) -> bool:
        """False where the answer cannot be parsed, takes too long or too much memory."""
        with self._lock:
            return self._ask(reference, answer)

    def _ask(self, reference: str, answer: str) -> bool:
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, "-P", str(pathlib.Path(__file__).resolve())]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            self._wait(60.0)  # the import of the library
        try:
            self._process.stdin.write(json.dumps([reference, answer]).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return False
        return self._wait(self._seconds) == b"true\n"

    def _wait(self, seconds: float) -> bytes:
        """The next line of the process; one that is late is killed."""
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        if not ready:
            self.close()
            return b""
        return self._process.stdout.readline()

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()
            self._process = None


def _serve() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    from math_verify import parse, verify

    print("ready", flush=True)
    for line in sys.stdin:
        try:
            pair = [parse(f"\\boxed{{{text}}}", parsing_timeout=LIBRARY_SECONDS) for text in json.loads(line)]
            same = bool(verify(*pair, timeout_seconds=LIBRARY_SECONDS))
        except Exception:  # sympy raises what it likes on text that is no mathematics
            same = False
        print(json.dumps(same), flush=True)


if __name__ == "__main__":
    _serve()
