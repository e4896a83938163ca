"""`python -m experiments.composed`."""

from experiments.composed.run import main

if __name__ == "__main__":
    main()
