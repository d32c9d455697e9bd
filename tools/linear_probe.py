"""`ssl-pipeline linear-probe` as a file. See `--help`."""

from ssl_pipeline.cli import tool

tool("linear-probe")
