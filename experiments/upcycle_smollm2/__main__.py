"""`python -m experiments.upcycle_smollm2`."""

from experiments.upcycle_smollm2.run import main

if __name__ == "__main__":
    main()
