"""Runs a script of this directory in a process of its own that has eight CPU devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def run_on_eight(script: str, *words: str | Path) -> str:
    """What the script said on stdout and stderr; it must end well."""
    path = os.pathsep.join([str(TESTS), str(TESTS / "support"), str(TESTS.parent)])
    command = [sys.executable, str(TESTS / "support" / script), *map(str, words)]
    environment = os.environ | {"PYTHONPATH": path, "JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run(
        command, env=environment, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
