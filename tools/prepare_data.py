"""`ssl-pipeline prepare-data` as a file. See `--help`."""

from ssl_pipeline.cli import tool

tool("prepare-data")
