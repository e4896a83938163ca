"""What a trained model does with a text: routes, thoughts, and how unsure it is."""
