"""`ssl-pipeline train-detectron2` as a file. See `--help`."""

from ssl_pipeline.cli import tool

tool("train-detectron2")
