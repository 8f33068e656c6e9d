"""How the student learns: what is captured from a forward pass, the losses, and the trainer."""
