"""What the small model looks like: how many layers it keeps, and which."""
