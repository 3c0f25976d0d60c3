"""Measurements in processes of their own: time, and the memory that is theirs alone."""

import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

INTERVAL = 0.25  # seconds between two looks at the memory, which take some milliseconds themselves


def in_process(*command: str) -> Any:
    """What `python COMMAND...` prints on its last line, as JSON. Ends this process if that fails."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def free_port() -> int:
    """Of this machine."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def watched(command: list[str]) -> dict[str, float]:
    """Runs `command`: seconds, and the largest memory of it and all its children together, in bytes.

    Memory is counted as Linux does for sums (PSS): a page that several processes share counts once.
    """
    start = time.perf_counter()
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(map(_shared_out, [process, *_children(process)])))
        time.sleep(INTERVAL)
    seconds = time.perf_counter() - start
    if process.returncode:
        sys.exit(process.stderr.read().decode())
    return {"seconds": seconds, "bytes": peak}


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _shared_out(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has just ended
        return 0


def own_memory() -> int:
    """Bytes that this process alone holds: neither what it shares with its parent nor mapped files (Linux)."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    match = re.search(r"Private_Dirty: +(\d+) kB", rollup)
    assert match
    return int(match[1]) * 1024


def resident() -> int:
    """Bytes of this process in memory, mapped files included."""
    return psutil.Process().memory_info().rss
