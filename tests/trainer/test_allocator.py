"""Freed memory stays in a process that trains on a CPU, and its caches do not grow."""

import platform
import subprocess
import sys

import pytest
import torch

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


GROWTH = """
import sys
from pathlib import Path
import torch
from trainer.allocator import bound_kernel_caches
if sys.argv[1] == "bound":
    bound_kernel_caches()
torch.set_num_threads(1)
weight = torch.ones(64, 64, dtype=torch.bfloat16)
def memory():
    return int(Path("/proc/self/statm").read_text().split()[1])
def steps(lengths):
    for length in lengths:
        rows = torch.ones(length, 64, dtype=torch.bfloat16, requires_grad=True)
        torch.nn.functional.linear(rows, weight).sum().backward()
steps(range(100, 200))
before = memory()
steps(range(200, 500))
print(memory() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="oneDNN has no bf16 on this CPU",
)
def test_batches_of_new_lengths_take_no_more_memory():
    def pages(how):
        command = [sys.executable, "-c", GROWTH, how]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert pages("bound") < pages("kept") / 4
