"""`python -m experiments.cot_decoding_composition`."""

from experiments.cot_decoding_composition.run import main

if __name__ == "__main__":
    main()
