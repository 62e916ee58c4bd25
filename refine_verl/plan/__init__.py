"""`python -m refine_verl.plan recipe=NAME key=value ...`: what a run will read, need and cost, without starting it."""
