"""`python -m orl_fast`, so that torchrun can start it: torchrun --nproc-per-node 8 -m orl_fast train."""

from orl_fast.cli.main import main

main()
