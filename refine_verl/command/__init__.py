"""What all commands share: their command line, and what they show."""
