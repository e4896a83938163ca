"""What steps and tokens cost, measured: one module per benchmark."""
