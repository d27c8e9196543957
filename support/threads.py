"""How the CPU threads of torch wait for each other. Import this before torch.

torch's threads meet at the end of every operation. GNU OpenMP lets the one that waits spin; when
another program takes a core, the spinning takes the time that the late thread needs, and everything
becomes several times slower. A bounded number of spins puts the waiting thread to sleep soon.
docs/speed.md says what is known of it.
"""
import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def described() -> str:
    """What is in force, for printed headers."""
    return f"GOMP_SPINCOUNT={os.environ['GOMP_SPINCOUNT']}"
