"""`python -m inbatch` and `torchrun -m inbatch` are the command `inbatch`."""

from inbatch.cli import main

if __name__ == "__main__":
    main()
