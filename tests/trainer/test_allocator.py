"""Freed memory stays in a process that trains on a CPU."""

import platform
import subprocess
import sys

import pytest

REUSE = """
import resource, sys
from trainer.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch = lambda: [bytes([1]) * 2**26 for _ in range(2)]
touch()
before = faults()
for _ in range(3):
    touch()
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_memory_of_one_step_serves_the_next():
    def page_faults(how):
        command = [sys.executable, "-c", REUSE, how]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert page_faults("kept") < 1000 < page_faults("returned")
