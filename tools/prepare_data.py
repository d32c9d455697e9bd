"""`ssl-pipeline prepare-data` as a file. See `--help`."""

import sys

from ssl_pipeline.cli import tool

sys.exit(tool("prepare-data"))
