"""`ssl-pipeline train-detectron2` as a file. See `--help`."""

import sys

from ssl_pipeline.cli import tool

sys.exit(tool("train-detectron2"))
