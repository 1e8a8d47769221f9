"""Runs every benchmark, one after the other, with the options given: `python -m benchmarks [--quick] [--json]`."""

from __future__ import annotations

import subprocess
import sys

BENCHMARKS = ("corpus", "engine", "serving", "training")


def main() -> int:
    """Returns the first exit code that is not 0."""
    for name in BENCHMARKS:
        done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *sys.argv[1:]], check=False)
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
