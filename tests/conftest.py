"""What every test shares: no network, one thread a process, the same examples on every run."""

from __future__ import annotations

import os
import socket
import sys

# Set before anything imports torch, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import pytest
from hypothesis import HealthCheck, settings

# Derandomised: a failure on one machine is a failure on all.  No deadline: two busy cores are slow.
settings.register_profile(
    "expunge",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("expunge")

LOOPBACK = {"localhost", "127.0.0.1", "::1", "0.0.0.0", "::", ""}


class NetworkRefused(RuntimeError):
    """A test, or what it called, tried to reach another machine."""


def _allowed(host: object) -> bool:
    name = host.decode() if isinstance(host, bytes) else host
    return name is None or str(name) in LOOPBACK or str(name).startswith("127.")


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Refuse every name look-up and connection that leaves this machine."""
    patch = pytest.MonkeyPatch()

    def guarded(original):
        def connect(self, address, *rest):
            if self.family in (socket.AF_INET, socket.AF_INET6) and not _allowed(address[0]):
                raise NetworkRefused(f"tests may not connect to {address[0]}")
            return original(self, address, *rest)

        return connect

    look_up = socket.getaddrinfo

    def getaddrinfo(host, *rest, **options):
        if not _allowed(host):
            raise NetworkRefused(f"tests may not look up {host!r}")
        return look_up(host, *rest, **options)

    for name in ("connect", "connect_ex"):
        patch.setattr(socket.socket, name, guarded(getattr(socket.socket, name)))
    patch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def model():
    """A tiny pipeline with random weights, one a test file."""
    from expunge.testing import tiny_diffusion

    return tiny_diffusion()


@pytest.fixture
def no_shared_pictures() -> None:
    """Pictures that earlier tests made are forgotten."""
    from expunge.core.sampling import SHARED

    SHARED.clear()


_threads_set = False


def pytest_runtest_setup() -> None:
    """One torch thread a process; torch itself is only imported by the tests that need it."""
    global _threads_set
    torch = sys.modules.get("torch")
    if torch is not None and not _threads_set:
        torch.set_num_threads(1)
        _threads_set = True
