"""Cases that are not judged well yet, by what is wrong. Who mends one takes it off: the test fails until then."""

from __future__ import annotations

BY_KIND: dict[str, tuple[str, ...]] = {
    "refusals that do not name what is wrong, or say more than one thing": (
        "main: model.tokenizer=''",
        "posttrain: data.task_key=word",
        "main: model.tokenizer=/does/not/exist",
        "prepare: --input is empty.jsonl",
        "prepare: --input is empty.jsonl.zst",
        "prepare: --input is blank_lines.jsonl",
        "prepare: --input is no_rows.parquet",
        "main: a model with hidden_size text",
        "plan: a model with hidden_size text",
        "main: a model with hidden_size null",
        "main: a model with hidden_size negative",
        "main: a model with num_heads that do not divide",
        "main: a model with num_heads 0",
        "main: a model with vocab_size 0",
        "plan: a model with vocab_size 0",
        "main: a model with num_hidden_layers text",
    ),
    "models that only some commands refuse, or that end in a traceback": (
        "evaluate: a model with weights cut in half",
        "evaluate: a model with weights cut in the header",
        "evaluate: a model with empty weights",
        "evaluate: a model with weights that are a pointer of Git LFS",
        "evaluate: a model with weights that are noise",
        "evaluate: a model with weights that are a web page",
        "evaluate: a model with weights that are not numbers",
        "inspect: a model with weights that are not numbers",
        "main: a model with model_type of attention",
        "evaluate: a model with model_type of attention",
        "inspect: a model with model_type of attention",
        "evaluate: a model with hidden_size text",
        "inspect: a model with hidden_size text",
        "evaluate: a model with hidden_size null",
        "inspect: a model with hidden_size null",
        "evaluate: a model with hidden_size negative",
        "inspect: a model with hidden_size negative",
        "evaluate: a model with num_heads that do not divide",
        "inspect: a model with num_heads that do not divide",
        "evaluate: a model with num_heads 0",
        "inspect: a model with num_heads 0",
        "evaluate: a model with num_hidden_layers text",
        "inspect: a model with num_hidden_layers text",
        "main: a model with quantization_config",
        "evaluate: a model with quantization_config",
        "inspect: a model with quantization_config",
        "main: a model with quantization_config unknown",
        "evaluate: a model with quantization_config unknown",
        "inspect: a model with quantization_config unknown",
    ),
    "files that end in a traceback, or are not read": (
        "main: reads documents.jsonl.gz",
        "main: reads a folder of a linked folder",
    ),
}

KNOWN = {case: kind for kind, cases in BY_KIND.items() for case in cases}
"""Case to kind."""
