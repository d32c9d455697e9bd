"""`python -m ssl_pipeline VERB` and, in several processes, `torchrun -m ssl_pipeline VERB`."""

from ssl_pipeline.cli import entry

entry()
