"""`python -m experiments.upcycle_kept`."""

from experiments.upcycle_kept.run import main

if __name__ == "__main__":
    main()
