"""`ssl-pipeline report` as a file. See `--help`."""

from ssl_pipeline.cli import tool

tool("report")
