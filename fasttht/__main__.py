"""`python -m fasttht` and `torchrun -m fasttht`."""

from fasttht.cli import main

main()
