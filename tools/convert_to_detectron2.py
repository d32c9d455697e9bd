"""`ssl-pipeline convert-to-detectron2` as a file. See `--help`."""

from ssl_pipeline.cli import tool

tool("convert-to-detectron2")
