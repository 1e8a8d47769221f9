"""Creates `.venv` and installs the pinned packages and Ganymede itself into it. Standard library only.

Run by `make setup`. Written so that an old Python 3 can still parse it: a too old one is told so, instead of failing
somewhere inside pip.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

VENV = Path(".venv")
LOCK = "requirements.lock"
NEEDED = (3, 11)


def main() -> None:
    """Installs; exits with a message that says what to install where something is missing."""
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < NEEDED:
        wanted = ".".join(map(str, NEEDED))
        fail(
            f"Ganymede needs Python {wanted} or newer",
            f"received: Python {found} ({sys.executable})",
            f"install Python {wanted} and run: make PYTHON=python{wanted}",
        )
    try:
        import ensurepip  # noqa: F401
        import venv
    except ImportError:
        fail(
            "Python's venv module is missing",
            f"received: {sys.executable}",
            "on Debian and Ubuntu: apt-get install python3-venv",
        )
    if not (VENV / "bin" / "python").exists():
        say(f"creating {VENV} with Python {found}")
        venv.create(VENV, with_pip=True)
    say(f"installing the pinned packages of {LOCK} (a few minutes the first time)")
    pip("--no-compile", "--requirement", LOCK)
    compile_modules()
    pip("--no-deps", "--no-build-isolation", "--editable", ".")
    say(f"ready: {VENV / 'bin' / 'ganymede'}")


def compile_modules() -> None:
    """Compiles on all cores what pip would compile on one; a file that is no module of this Python is passed over."""
    packages = next(VENV.glob("lib/python*/site-packages"))
    command = [str(VENV / "bin" / "python"), "-m", "compileall", "-q", "-j", str(os.cpu_count() or 1), str(packages)]
    show("compiling")
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    show("")


def pip(*arguments: str) -> None:
    """Runs `pip install` inside the environment, showing which package it is at; a failure shows pip's own words."""
    python = str(VENV / "bin" / "python")
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
    lines, count = [], 0
    for line in process.stdout or ():
        lines.append(line)
        if line.startswith("Collecting "):
            count += 1
            show(f"{count:3d}  {line.split()[1]}")
        elif line.startswith("Installing collected packages"):
            show("unpacking")
    show("")
    if process.wait() != 0:
        fail("pip could not install", "".join(lines[-15:]).strip(), "see pip above, then run the same command")


def show(text: str) -> None:
    """Rewrites one line of a terminal; silent elsewhere."""
    if sys.stdout.isatty():
        print("\r\033[K  " + text[:70], end="" if text else "\r", flush=True)


def say(line: str) -> None:
    """One line for the person who waits."""
    print(f"ganymede: {line}", flush=True)


def fail(what: str, received: str, step: str) -> NoReturn:
    """Ends the set-up with a clear message."""
    sys.exit(f"error: {what}\n  {received}\n  next: {step}")


if __name__ == "__main__":
    main()
