"""What a result of the soak says of where it was made."""

import os
import platform
from importlib.metadata import version


def machine() -> dict[str, object]:
    """Return the machine in words; no name of it."""
    return {
        "system": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
    }


def versions(*more: str) -> dict[str, str]:
    """Return versions of what matters to the store."""
    names = ("gapprobe", "torch", "pyarrow", "numpy", "pandas", "xxhash", *more)
    return {"python": platform.python_version()} | {name: version(name) for name in names}
