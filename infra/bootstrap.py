"""Creates `.venv` and installs the pinned packages and Ganymede itself into it. Standard library only.

Run by `make setup`; works on any Python that can parse it, so that a too old one is told so instead of failing
somewhere inside pip.
"""

import os
import subprocess
import sys

VENV = ".venv"
LOCK = "requirements.lock"
NEEDED = (3, 11)


def main():
    """Installs; exits with a message that says what to install where something is missing."""
    if sys.version_info < NEEDED:
        fail(
            "Ganymede needs Python %d.%d or newer" % NEEDED,
            "this is Python %s (%s)" % (sys.version.split()[0], sys.executable),
            "install Python 3.11 and run: make PYTHON=python3.11",
        )
    try:
        import ensurepip  # noqa: F401
        import venv
    except ImportError:
        fail(
            "Python's venv module is missing",
            "received: %s" % sys.executable,
            "on Debian and Ubuntu: apt-get install python3-venv",
        )
    python = os.path.join(VENV, "bin", "python")
    if not os.path.exists(python):
        say("creating %s with Python %s" % (VENV, sys.version.split()[0]))
        venv.create(VENV, with_pip=True)
    say("installing the pinned packages of %s (a few minutes the first time)" % LOCK)
    pip(python, "--requirement", LOCK)
    pip(python, "--no-deps", "--no-build-isolation", "--editable", ".")
    say("ready: %s" % os.path.join(VENV, "bin", "ganymede"))


def pip(python, *arguments):
    """Runs `pip install` inside the environment, showing which package it is at; a failure shows pip's own words."""
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines, count = [], 0
    for line in process.stdout:
        lines.append(line)
        if line.startswith("Collecting "):
            count += 1
            show("%3d  %s" % (count, line.split()[1]))
        elif line.startswith("Installing collected packages"):
            show("unpacking")
    show("")
    if process.wait() != 0:
        fail("pip could not install", "".join(lines[-15:]).strip(), "see pip's message above, then run the same command")


def show(text):
    """Rewrites one line of a terminal; silent elsewhere."""
    if sys.stdout.isatty():
        print("\r\033[K  " + text[:70], end="" if text else "\r", flush=True)


def say(line):
    """One line for the person who waits."""
    print("ganymede: " + line, flush=True)


def fail(what, received, step):
    """Ends the set-up with a clear message."""
    sys.exit("error: %s\n  %s\n  next: %s" % (what, received, step))


if __name__ == "__main__":
    main()
