"""`ssl-pipeline analyze` as a file. See `--help`."""

from ssl_pipeline.cli import tool

tool("analyze")
