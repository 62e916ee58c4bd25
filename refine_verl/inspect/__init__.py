"""Where REFINE would look in a text and what it would say there: `python -m refine_verl.inspect`.

The paper's Table F.1 and Fig. E.2 for any model and text, in one process: the actor's own rollout and the rewards of
the registry, without Ray and verl.
"""
