"""`ssl-pipeline semi-supervised` as a file. See `--help`."""

from ssl_pipeline.cli import tool

tool("semi-supervised")
