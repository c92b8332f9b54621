"""Importing the package, and taking what it has, leaves the process as it was."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import random, sys
random.seed(0)
before = random.getstate()
import layercut
assert "torch" not in sys.modules
for name in layercut.__all__:
    getattr(layercut, name)
    assert random.getstate() == before, name
"""


def test_taking_a_name_from_the_package_leaves_the_state_of_random_as_it_is():
    subprocess.run([sys.executable, "-c", CODE], check=True)
