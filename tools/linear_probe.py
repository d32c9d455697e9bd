"""`ssl-pipeline linear-probe` as a file. See `--help`."""

import sys

from ssl_pipeline.cli import tool

sys.exit(tool("linear-probe"))
