"""The Ray side of training: one worker per GPU (or per CPU share) with the model, its rollouts and its rewards."""
