"""`python -m experiments.any_budget`."""

from experiments.any_budget.run import main

if __name__ == "__main__":
    main()
