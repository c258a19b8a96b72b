"""What a packed weight is made of, in which formats it is held, and where it is kept."""
