#!/usr/bin/env python3
"""Train several methods over several seeds and compare them image by image; the same as `fasttht compare`.

tools/compare_runs.py --methods at that trades --seeds 0 1 2 --output runs/compare
"""

import sys

try:
    from fasttht.cli import main
except ModuleNotFoundError as error:
    sys.exit(f"compare_runs.py: expected fasttht to be installed, got {error}; run: pip install -e .")

main(["compare", *sys.argv[1:]])
