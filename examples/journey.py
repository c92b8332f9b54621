"""The whole journey from Python, resumable: what `layercut compress MODEL --ratio 0.2 --out OUT` does.

    python examples/journey.py MODEL OUT [KEY=VALUE …]

KEY=VALUE are settings, named as in a config file: tune_tokens=65536.
"""

import logging
import sys

import yaml

import layercut as lc

name, out, *given = sys.argv[1:]
settings = {key: yaml.safe_load(value) for key, _, value in (setting.partition("=") for setting in given)}
logging.basicConfig(level=logging.INFO, format="%(message)s")
run = lc.compress(name, **({"ratio": 0.2} | settings), out=out)
print(run)
