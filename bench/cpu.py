"""CPU seconds of this process and all that it started, from ``/proc``; Linux only."""

import os
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def seconds() -> float:
    """CPU seconds so far: user and system, of the process tree, ended children that were waited for too."""
    rows = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended meanwhile
                continue
            rows[int(folder.name)] = (int(fields[1]), sum(int(ticks) for ticks in fields[11:15]))
    total, waiting = 0, [os.getpid()]
    while waiting:
        number = waiting.pop()
        total += rows.get(number, (0, 0))[1]
        waiting += [child for child, (parent, _) in rows.items() if parent == number]
    return total / _TICKS
