"""What this machine's CPU can compute with, as far as answers in fewer bits and their speed depend on it."""

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
LISTS = ("flags", "Features")
"""Keys of its lines that list extensions, on x86 and on ARM."""

X86 = ("f16c", "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_fp16", "amx_int8")
ARM = ("asimdhp", "asimddp", "i8mm", "sve")


def cpu_features() -> tuple[str, ...]:
    """The architecture, such as x86_64, and those of the extensions above that Linux lists; other systems tell none."""
    listed: set[str] = set()
    if CPUINFO.is_file():
        for line in CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in LISTS:
                listed = set(value.split())
                break
    return (platform.machine(), *(name for name in (*X86, *ARM) if name in listed))
