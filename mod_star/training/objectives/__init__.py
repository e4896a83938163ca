"""What training minimises: next-token prediction and Quiet-STaR."""
