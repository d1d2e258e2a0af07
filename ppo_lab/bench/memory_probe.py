"""The most memory that a piece of work takes, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

# VmHWM is set back to the present size before the work (Linux), so that what came before is left
# out; the first call is left out too, since it loads kernels and imports.
_AROUND = """
import gc

def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

work()
gc.collect()
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
work()
print(status("VmHWM") - before)
"""


def peak_of(code: str) -> float:
    """MiB by which `work()`, which `code` defines, raises the resident memory at its highest.

    Raises:
        RuntimeError: the process failed; the message holds the end of what it said.
    """
    command = [sys.executable, "-c", code + _AROUND]
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        raise RuntimeError("\n".join(done.stderr.splitlines()[-8:]))
    return float(done.stdout.splitlines()[-1])
