"""`ssl-pipeline convert-to-detectron2` as a file. See `--help`."""

import sys

from ssl_pipeline.cli import tool

sys.exit(tool("convert-to-detectron2"))
