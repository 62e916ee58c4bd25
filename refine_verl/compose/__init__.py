"""From recipes and overrides to one checked configuration. Loads neither torch nor verl.

`composition` merges recipes, presets and overrides with Hydra; `schema` holds the result to the keys that exist,
`validate` to what they may hold, `phases` to what the phase has, `verl_keys` verl's own keys to what they do here.
`messages` puts Hydra's errors for a person, `naming` names runs.
"""
