"""Which process makes a run, and whether it is still there: a run that was killed cannot say so itself."""

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROC = Path("/proc")
MACHINE = ("boot", "namespace")  # what a PID means something within: a start of a machine, a container on it


def this_process() -> dict[str, Any]:
    """Gives host and PID for people, and what tells this process from any other: where there is no /proc, None."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "boot": _read(PROC / "sys/kernel/random/boot_id"),
        "namespace": _link(PROC / "self/ns/pid"),
    }


def is_alive(process: Mapping[str, Any]) -> bool | None:
    """Whether a process is still there, by what it said of itself; None if that cannot be told from here.

    It can be told where PIDs mean the same as to the process: since the same start of the same machine, in the same
    container. A PID that is in use again is told by the time at which its process started.
    """
    here = this_process()
    if not process.get("started") or any(not here[name] or process.get(name) != here[name] for name in MACHINE):
        return None
    if _started(process["pid"]) == process["started"]:
        return True
    try:
        os.kill(process["pid"], 0)
    except PermissionError:  # somebody else's, of whom /proc may tell nothing
        return None
    except ProcessLookupError:
        pass
    return False


def _started(pid: int) -> int | None:
    """When a process started, in clock ticks since the machine did; None if it has ended, also where nobody has noticed
    yet (a zombie)."""
    content = _read(PROC / str(pid) / "stat") or ""
    fields = content.rpartition(")")[2].split()  # (the name before it may hold anything); proc(5), from field 3 on
    return int(fields[19]) if fields and fields[0] not in "ZX" else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _link(path: Path) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None
