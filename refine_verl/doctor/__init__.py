"""`python -m refine_verl.doctor`: is this machine ready to train, and if not, what to do about it."""
