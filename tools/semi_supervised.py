"""`ssl-pipeline semi-supervised` as a file. See `--help`."""

import sys

from ssl_pipeline.cli import tool

sys.exit(tool("semi-supervised"))
