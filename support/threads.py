"""How the CPU threads of torch wait for each other. Import this before torch.

torch's threads meet at the end of every operation. GNU OpenMP lets the one that waits spin; when
another program takes a core, the spinning takes the time that the late thread needs, and everything
becomes several times slower. After a thousand spins the waiting thread goes to sleep instead: the
table in docs/speed.md, "Threads", shows what other numbers cost.
"""
import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def described() -> str:
    """What is in force, for printed headers."""
    return ", ".join(f"{name}={os.environ[name]}" for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
                     if name in os.environ)
