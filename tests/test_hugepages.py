"""Large pages: asked for where they help, once, and given."""

import subprocess
import sys

import pytest

from bit_jax.process import hugepages

ALLOCATES = """
import ctypes, os, re
from bit_jax.process import hugepages
hugepages.restart()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
size = 2**27
block = libc.malloc(ctypes.c_size_t(size))
libc.memset(ctypes.c_void_p(block), 1, ctypes.c_size_t(size))
with open("/proc/self/smaps_rollup") as file:
    print(os.getpid(), os.environ["GLIBC_TUNABLES"], re.search(r"AnonHugePages: *([0-9]+) kB", file.read())[1])
"""


@pytest.mark.skipif(not hugepages.would_help({}), reason="this system does not give large pages on request")
def test_a_program_that_starts_itself_again_is_given_large_pages():
    with subprocess.Popen(
        [sys.executable, "-c", ALLOCATES], env={"GLIBC_TUNABLES": "glibc.malloc.check=0"}, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        number, tunables, kilobytes = process.stdout.read().split()
    assert int(number) == process.pid  # the same process
    assert tunables == b"glibc.malloc.check=0:glibc.malloc.hugetlb=1"
    assert int(kilobytes) >= 2**16  # half of what was allocated, at least


def test_a_program_is_not_started_again_where_it_has_them_or_computes_elsewhere(tmp_path, monkeypatch):
    given = {}
    mode = tmp_path / "enabled"
    monkeypatch.setattr(hugepages, "MODE", mode)
    monkeypatch.setattr(hugepages.platform, "libc_ver", lambda: ("glibc", "2.36"))
    mode.write_text("always [madvise] never\n")
    assert hugepages.would_help(given | {"JAX_PLATFORMS": "cpu"})
    assert not hugepages.would_help({"JAX_PLATFORMS": "cuda"})
    assert not hugepages.would_help({"JAX_PLATFORMS": "cpu"} | hugepages.environment(given))
    mode.write_text("[always] madvise never\n")
    assert not hugepages.would_help({"JAX_PLATFORMS": "cpu"})
    mode.write_text("always [madvise] never\n")
    monkeypatch.setattr(hugepages.platform, "libc_ver", lambda: ("glibc", "2.31"))
    assert not hugepages.would_help({"JAX_PLATFORMS": "cpu"})
