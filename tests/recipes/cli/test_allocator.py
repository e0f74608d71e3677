from __future__ import annotations

import platform
import subprocess
import sys

import pytest

CODE = """if True:
    import ctypes, resource, torch
    from recipes.cli.allocator import keep_freed_memory
    {call}
    for i in range(6):
        if i == 3:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.ones(2**21) for _ in range(8)]  # of 8 MB
        del blocks
    print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 3)
"""


def faults(call: str, **environment: str) -> float:
    """Return the pages that are taken again each time."""
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(call=call)], capture_output=True, text=True, check=True, env=environment
    )
    return float(done.stdout)


EACH_FROM_THE_SYSTEM = "ctypes.CDLL(None).mallopt(-3, 65536)"  # what chance does otherwise


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_taken_again_without_page_faults():
    assert faults(EACH_FROM_THE_SYSTEM) > 1000
    assert faults(f"{EACH_FROM_THE_SYSTEM}; keep_freed_memory()") < 1000
    assert faults("keep_freed_memory()", MALLOC_MMAP_THRESHOLD_="65536") > 1000  # the user's choice


def test_a_system_without_glibc_is_left_alone(monkeypatch):
    from recipes.cli import allocator

    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    allocator.keep_freed_memory()
