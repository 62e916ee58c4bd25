"""The driver: verl's PPO trainer with REFINE's step, and what is checked before it starts."""
