"""`python -m pipeline.cli` and `torchrun -m pipeline.cli`."""

from pipeline.cli.app import main

main()
