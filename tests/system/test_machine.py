import platform
import subprocess
import sys

import psutil
import pytest
import torch
from helpers import ROOT
from processes import forked

from scripts.machine import available_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
@pytest.mark.slow
def test_more_than_two_gigabytes_are_kept():
    code = (
        "import psutil, torch; from scripts.workflow import keep_freed_memory; keep_freed_memory();"
        "ones = [torch.ones(2**29) for _ in range(2)]; del ones;"
        "kept = psutil.Process().memory_info().rss; assert kept >= 4 * 2**30, kept"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, check=True)


@pytest.mark.slow
def test_available_memory_heeds_the_limit_of_the_user():
    code = (
        "import resource, torch; from scripts.machine import available_memory as a;"
        "cpu = torch.device('cpu');"
        "free = a(cpu); limit = 6 * 2**30; resource.setrlimit(resource.RLIMIT_AS, (limit, limit));"
        "assert 0 < a(cpu) < min(free + 1, limit), (free, a(cpu))"
    )
    result = forked(code)
    assert result.returncode == 0, result.stderr
    assert available_memory(torch.device("cpu")) <= psutil.virtual_memory().total
