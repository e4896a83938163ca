"""`python -m experiments.mode`."""

from experiments.mode.run import main

if __name__ == "__main__":
    main()
