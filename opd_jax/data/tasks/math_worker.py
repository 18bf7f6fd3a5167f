"""Compares mathematical expressions, one pair per line. `math_checker` starts this file as a script.

Reads JSON lines [reference, answer] and writes true, false or null (cannot be compared). A comparison that takes too much processor time
ends the process: the signal's default action also interrupts arithmetic on huge integers, which an exception cannot.
"""

import contextlib
import json
import logging
import os
import resource
import signal
import sys

CPU_SECONDS, MEMORY_BYTES = 3.0, 2**31


def compare(reference: str, answer: str) -> bool | None:
    from math_verify import LatexExtractionConfig, parse, verify

    # Its other way of reading hands text to sympy's parse_expr, which evaluates it as Python.
    latex = [LatexExtractionConfig()]
    try:
        expected, given = (parse(f"\\boxed{{{text}}}", extraction_config=latex, parsing_timeout=None) for text in (reference, answer))
        return bool(verify(expected, given, timeout_seconds=None)) if expected and given else None
    except (Exception, RecursionError, MemoryError):  # sympy and its parser raise nearly everything
        return None


def main() -> None:
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print goes where errors go
    logging.disable()
    with contextlib.suppress(ValueError, OSError):  # not every system has this limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    compare("1", "1")
    print("ready", file=results, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        value = compare(*json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(value), file=results, flush=True)


if __name__ == "__main__":
    main()
