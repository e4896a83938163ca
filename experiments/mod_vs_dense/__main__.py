"""`python -m experiments.mod_vs_dense`."""

from experiments.mod_vs_dense.run import main

if __name__ == "__main__":
    main()
