"""`python -m experiments.think_at_hard`."""

from experiments.think_at_hard.run import main

if __name__ == "__main__":
    main()
