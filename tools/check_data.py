"""`ssl-pipeline check-data` as a file. See `--help`."""

from ssl_pipeline.cli import tool

if __name__ == "__main__":  # its processes import this file too
    tool("check-data")
