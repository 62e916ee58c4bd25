"""Data made ready once, on the command line: `python -m refine_verl.prepare ruler_qa|longbench|documents`.

`ruler_qa` generates question answering at a given length, `longbench` turns the official files into prompts,
`documents` picks long documents out of a corpus. All write parquet that `data.train_files` and `data.val_files`
take; all can be interrupted and called again with the same arguments.
"""
