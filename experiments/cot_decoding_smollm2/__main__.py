"""`python -m experiments.cot_decoding_smollm2`."""

from experiments.cot_decoding_smollm2.run import main

if __name__ == "__main__":
    main()
