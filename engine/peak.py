"""The most memory that this process has held. Needs no torch."""

import resource
import sys
from contextlib import suppress
from pathlib import Path


def forget_peak_memory() -> None:
    """Let `peak_memory` begin anew from what is held now; only Linux can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory() -> int:
    """Return the largest resident size of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # the system call's figure begins with that of the parent process
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
