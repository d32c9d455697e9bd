"""`ssl-pipeline report` as a file. See `--help`."""

import sys

from ssl_pipeline.cli import tool

sys.exit(tool("report"))
