#!/usr/bin/env python3
"""Write ImageNet, a folder of images or the embedded digits as .beton files; the same as `fasttht data write`.

tools/write_ffcv.py imagenet --source /data/imagenet --output /data/beton
"""

import sys

try:
    from fasttht.cli import main
except ModuleNotFoundError as error:
    sys.exit(f"write_ffcv.py: expected fasttht to be installed, got {error}; run: pip install -e .")

main(["data", "write", *sys.argv[1:]])
