"""`python -m cadre`: what `torchrun -m cadre` starts."""

from cadre.cli.main import main

main()
