"""`python -m ssl_pipeline VERB` and, in several processes, `torchrun -m ssl_pipeline VERB`."""

import sys

from ssl_pipeline.cli import main

sys.exit(main())
