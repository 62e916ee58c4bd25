"""Batches: padding, dummies, verl's dataset contract, and every validation document exactly once."""

from pathlib import Path

import pytest
import torch

from refine_verl.data import DataError
from refine_verl.data.dataset import DocumentDataset, collate_columns, pad_batch
from refine_verl.data.prepare import prepare
from refine_verl.data.verl_dataset import VerlDocumentDataset


@pytest.fixture
def prepared(make_settings, bytes_tokenizer):
    files = {f"{i:02}.txt": chr(ord("a") + i) * (i + 3) for i in range(11)}
    return prepare(make_settings(files), "train", bytes_tokenizer)


def test_items(prepared):
    dataset = DocumentDataset(prepared.path)
    assert len(dataset) == 11
    assert torch.equal(dataset[2]["input_ids"], torch.tensor([ord("c")] * 5))
    assert dataset[2]["input_ids"].dtype == torch.int64
    assert (dataset[2]["document_id"], dataset[2]["length"]) == (2, 5)
    row = dataset.table[2]
    assert (Path(row["source"]).name, row["row"], row["window"]) == ("02.txt", 0, 0)
    assert dataset.lengths.tolist() == list(range(3, 14))


def batch_of(dataset, rows):
    return collate_columns({name: [dataset[i][name] for i in rows] for name in ("input_ids", "document_id")})


def test_collate_pads_on_the_right(prepared):
    batch = batch_of(DocumentDataset(prepared.path), [1, 0])
    assert batch["tokens"].tolist() == [[98] * 4, [97] * 3 + [0]]
    assert batch["lengths"].tolist() == [4, 3]
    assert batch["document_id"].tolist() == [1, 0]
    assert batch["weight"].tolist() == [1.0, 1.0]
    assert {value.dtype for key, value in batch.items() if key != "weight"} == {torch.int64}


@pytest.mark.parametrize(("rows", "multiple", "total"), [(3, 4, 4), (5, 4, 8), (4, 4, 4), (1, 3, 3)])
def test_pad_batch_adds_weightless_copies_of_the_shortest(prepared, rows, multiple, total):
    batch = batch_of(DocumentDataset(prepared.path), list(reversed(range(rows))))
    padded = pad_batch(batch, multiple)
    assert all(len(value) == total for value in padded.values())
    assert padded["weight"].tolist() == [1.0] * rows + [0.0] * (total - rows)
    assert padded["lengths"][rows:].tolist() == [3] * (total - rows)
    for key in batch:
        assert torch.equal(padded[key][:rows], batch[key])
    assert batch["weight"].tolist() == [1.0] * rows


def test_missing_directory_and_foreign_directory(tmp_path):
    with pytest.raises(DataError, match=r"no prepared documents at .*data\.cache_dir"):
        DocumentDataset(tmp_path / "missing")
    with pytest.raises(DataError, match="is not a directory of prepared documents"):
        DocumentDataset(tmp_path)


def test_verl_subsets(prepared):
    def ids(max_samples, **config):
        dataset = VerlDocumentDataset(str(prepared.path), None, None, config, max_samples=max_samples)
        return [dataset[i]["document_id"] for i in range(len(dataset))]

    assert ids(-1) == list(range(11))
    assert ids(4) == [0, 1, 2, 3]
    shuffled = ids(4, shuffle=True, seed=3)
    assert shuffled == ids(4, shuffle=True, seed=3) != ids(4, shuffle=True, seed=4)
    assert len(set(shuffled)) == 4
    assert len(VerlDocumentDataset(None, None, None, {})) == 0
    with pytest.raises(DataError, match="one prepared directory, not 2"):
        VerlDocumentDataset(["a", "b"], None, None, {})


@pytest.fixture(scope="module")
def verl():
    """`(verl.trainer.ppo.utils, StatefulDataLoader, collate_fn)`: what verl's `_init_dataloader` uses."""
    from torchdata.stateful_dataloader import StatefulDataLoader
    from verl.trainer.ppo import utils
    from verl.utils.dataset.rl_dataset import collate_fn

    return utils, StatefulDataLoader, collate_fn


class TestThroughVerl:
    """The pieces `_init_dataloader` puts together, as verl 0.9.1 puts them together."""

    @pytest.fixture
    def config(self, prepared):
        from omegaconf import OmegaConf

        custom = {"path": "pkg://refine_verl.data.verl_dataset", "name": "VerlDocumentDataset"}
        return OmegaConf.create({"train_files": str(prepared.path), "shuffle": True, "seed": 7, "custom_cls": custom})

    def train_loader(self, verl, config):
        utils, loader, collate_fn = verl
        dataset = utils.create_rl_dataset(config.train_files, config, None, None, is_train=True, max_samples=-1)
        sampler = utils.create_rl_sampler(config, dataset)
        return loader(dataset, batch_size=4, drop_last=True, collate_fn=collate_fn, sampler=sampler)

    def test_order_depends_on_the_seed_only(self, verl, config):
        def order(seed):
            config.seed = seed
            return [batch["document_id"].tolist() for batch in self.train_loader(verl, config)]

        assert order(7) == order(7) != order(8)
        assert sum(order(7), []) != sorted(sum(order(7), []))

    def test_resumes_where_it_stopped(self, verl, config):
        loader = self.train_loader(verl, config)
        batches = iter(loader)
        next(batches)
        state = loader.state_dict()
        rest = [batch["document_id"].tolist() for batch in batches]
        resumed = self.train_loader(verl, config)
        resumed.load_state_dict(state)
        assert [batch["document_id"].tolist() for batch in resumed] == rest
        assert rest

    @pytest.mark.parametrize("batch_size", [11, 4, 3])
    def test_every_validation_document_counts_once(self, verl, config, batch_size):
        utils, loader, collate_fn = verl
        dataset = utils.create_rl_dataset(config.train_files, config, None, None, is_train=False)
        seen = torch.zeros(11)
        for columns in loader(dataset, batch_size=batch_size, shuffle=False, collate_fn=collate_fn):
            batch = pad_batch(collate_columns(columns), multiple=4)
            assert len(batch["tokens"]) % 4 == 0
            seen.index_add_(0, batch["document_id"], batch["weight"])
            for tokens, length, document in zip(batch["tokens"], batch["lengths"], batch["document_id"], strict=True):
                assert tokens.tolist()[:length] == [ord("a") + int(document)] * (int(document) + 3)
        assert seen.tolist() == [1.0] * 11
