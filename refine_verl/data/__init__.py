"""Documents: found, checked, tokenised, cut to length, cached, and served in batches.

The usual way through the package::

    settings = DataSettings.from_mapping(config.data)
    prepared = prepare(settings, "train", tokenizer, minimum_length=14, reason="...")   # data.prepare
    dataset = DocumentDataset(prepared.path)                                            # data.dataset

Only the light names are imported here; `prepare`, `tokenizers`, `dataset` and `verl_dataset` are modules.
"""

from refine_verl.config import DataError, DataSettings
