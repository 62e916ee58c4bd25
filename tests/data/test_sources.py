"""What names stand for: files, directories, globs, the hub, the standard library; and names that fail."""

import datasets
import pytest
from huggingface_hub import constants

from refine_verl.config import DataSettings
from refine_verl.data import DataError, sources
from refine_verl.data.sources import (
    HubSource,
    StandardLibrarySource,
    iterate_documents,
    iterate_texts,
    resolve_sources,
    say_if_counted_twice,
)
from refine_verl.data.tokenize import TEXT_SCHEMA, write_rows


def resolve(*names, split="train"):
    return resolve_sources(names, key="data.train_files", default_split=split)


def names(found, root):
    return [str(source.path.relative_to(root)) for source in found]


@pytest.fixture
def corpus(tmp_path):
    for name in ("b.txt", "a.txt", "deep/er/c.txt", "deep/b.jsonl", ".hidden.txt", ".git/x.txt", "notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "json"}' if name.endswith("jsonl") else f"text of {name}")
    return tmp_path


def test_directory_is_recursive_sorted_and_leaves_out_the_rest_aloud(corpus, caplog):
    assert names(resolve(str(corpus)), corpus) == ["a.txt", "b.txt", "deep/b.jsonl", "deep/er/c.txt"]
    assert "left out files of other kinds" in caplog.text
    assert "1 .md" in caplog.text


def test_order_of_names_is_kept_and_texts_follow_it(corpus):
    sources = resolve(str(corpus / "b.txt"), str(corpus / "deep"), str(corpus / "a.txt"))
    assert names(sources, corpus) == ["b.txt", "deep/b.jsonl", "deep/er/c.txt", "a.txt"]
    texts = ["text of b.txt", "json", "text of deep/er/c.txt", "text of a.txt"]
    assert list(iterate_texts(sources, "text")) == texts
    assert write_rows(iterate_documents(sources, "text"), TEXT_SCHEMA, corpus / "out.arrow") == 4
    assert datasets.Dataset.from_file(str(corpus / "out.arrow"))["text"][:] == texts


def test_glob(corpus):
    assert names(resolve(str(corpus / "**" / "*.txt")), corpus) == ["a.txt", "b.txt", "deep/er/c.txt"]
    with pytest.raises(DataError, match=r"data\.train_files: no file matches .*z\*\.txt"):
        resolve(str(corpus / "z*.txt"))


def test_file_whose_name_looks_like_a_pattern(tmp_path):
    (tmp_path / "a[1].txt").write_text("x")
    assert len(resolve(str(tmp_path / "a[1].txt"))) == 1


def test_missing_file_names_the_nearest(corpus):
    with pytest.raises(DataError, match=r"aa\.txt does not exist\. Nearest existing: .*/a\.txt"):
        resolve(str(corpus / "aa.txt"))
    with pytest.raises(DataError, match=r"does not exist\. Nearest existing: .*/deep\."):
        resolve(str(corpus / "depe" / "b.jsonl"))


def test_empty_directory_says_what_it_holds(tmp_path):
    with pytest.raises(DataError, match=r"holds no document files \(\.parquet, .*it holds nothing"):
        resolve(str(tmp_path))
    (tmp_path / "a.md").write_text("x")
    with pytest.raises(DataError, match=r"it holds 1 \.md"):
        resolve(str(tmp_path))


def test_unsupported_file_given_by_name(corpus):
    with pytest.raises(DataError, match="unsupported suffix '.md'"):
        resolve(str(corpus / "notes.md"))


def test_nothing_given_and_given_twice(corpus):
    with pytest.raises(DataError, match=r"data\.train_files is empty"):
        resolve()
    with pytest.raises(DataError, match=r"a\.txt more than once"):
        resolve(str(corpus / "a.txt"), str(corpus / "a.txt"))


class TestHub:
    """A directory in the layout of a hub dataset stands in for the hub."""

    @pytest.fixture
    def hub(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        place = tmp_path / "elsewhere" / "data"
        for split, texts in {"train": ["one", "two"], "validation": ["three"]}.items():
            rows = datasets.Dataset.from_dict({"id": list(range(len(texts))), "text": texts})
            rows.to_parquet(str(place / f"{split}-00000-of-00001.parquet"))
        load = datasets.load_dataset

        def from_disk(repo, config, split):
            if repo != "some-org/some-text":
                raise ConnectionError("offline mode is enabled")
            return load(str(place.parent), config, split=split, cache_dir=str(tmp_path / "hf"))

        monkeypatch.setattr(datasets, "load_dataset", from_disk)
        monkeypatch.setattr(sources, "hub_is_reachable", lambda: True)
        return tmp_path

    def test_splits(self, hub):
        def texts(name, split="train"):
            return list(iterate_texts(resolve(name, split=split), "text"))

        assert texts("some-org/some-text") == ["one", "two"]
        assert texts("some-org/some-text", "validation") == ["three"]
        assert texts("some-org/some-text:validation") == ["three"]
        assert texts("some-org/some-text:default:train") == ["one", "two"]

    def test_fingerprint_is_stable_and_differs_between_splits(self, hub):
        train = [resolve("some-org/some-text:train")[0].fingerprint() for _ in range(2)]
        assert train[0] == train[1] != resolve("some-org/some-text:validation")[0].fingerprint()

    def test_wrong_column(self, hub):
        with pytest.raises(DataError, match="has no column 'body'; its columns are: id, text"):
            list(iterate_texts(resolve("some-org/some-text"), "body"))

    def test_wrong_split(self, hub):
        with pytest.raises(DataError, match=r"\(split 'tset'\) could not be loaded.*tset"):
            resolve("some-org/some-text:tset")

    def test_unreachable_says_how_to_use_local_files(self, hub):
        with pytest.raises(DataError, match=r"(?s)ConnectionError: offline.*copy the data here as parquet"):
            resolve("other/name")

    def test_no_network_is_said_at_once(self, hub, monkeypatch):
        """The hub client would try for half a minute."""
        monkeypatch.setattr(sources, "hub_is_reachable", lambda: False)
        monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
        with pytest.raises(DataError, match=r"(?s)cannot be reached.*HF_HUB_OFFLINE=1.*copy it here as parquet"):
            resolve("some-org/some-text")
        monkeypatch.setattr(constants, "is_offline_mode", lambda: True)  # then the cache is asked
        assert isinstance(resolve("some-org/some-text")[0], HubSource)

    def test_asking_the_hub_is_said_with_the_nearest_path(self, hub, caplog):
        (hub / "some-org" / "some-test").mkdir(parents=True)
        resolve("some-org/some-text")
        assert "some-org/some-text is no local path. Nearest existing: " in caplog.text
        assert "some-test. Asking the Hugging Face hub" in caplog.text

    def test_local_path_comes_first(self, hub):
        local = hub / "some-org" / "some-text"
        local.mkdir(parents=True)
        (local / "a.txt").write_text("local")
        assert not isinstance(resolve("some-org/some-text")[0], HubSource)

    def test_name_with_a_file_suffix_is_a_missing_file(self, hub):
        with pytest.raises(DataError, match=r"data/train\.parquet does not exist"):
            resolve("data/train.parquet")


class TestStandardLibrary:
    def test_splits_are_disjoint_whole_and_large_enough(self):
        train, validation = (StandardLibrarySource(split) for split in ("train", "validation"))
        assert not set(train.files) & set(validation.files)
        together = train.files + validation.files
        assert len(together) > 300
        assert 0.02 < len(validation.files) / len(together) < 0.10
        assert train.files == sorted(train.files)
        assert not any({"test", "tests", "site-packages"} & set(name.split("/")) for name in together)

    def test_default_split_and_names(self):
        assert resolve("python_stdlib")[0].name == "python_stdlib:train"
        assert resolve("python_stdlib", split="validation")[0].name == "python_stdlib:validation"
        record = next(resolve("python_stdlib:validation")[0].records("text"))
        assert record.source.startswith("python_stdlib/")

    def test_unreadable_and_empty_files_are_left_out(self, tmp_path, monkeypatch):
        for i in range(40):
            (tmp_path / f"m{i}.py").write_text(f"x = {i}\n")
        (tmp_path / "empty.py").write_text("")
        (tmp_path / "latin.py").write_bytes(b"# \xe4")
        monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
        sources = [StandardLibrarySource(split) for split in ("train", "validation")]
        assert sorted(iterate_texts(sources, "text")) == sorted(f"x = {i}\n" for i in range(40))

    def test_errors(self, tmp_path, monkeypatch):
        with pytest.raises(DataError, match="no split 'test'; write python_stdlib:train or"):
            resolve("python_stdlib:test")
        with pytest.raises(DataError, match="its columns are: text"):
            list(iterate_texts(resolve("python_stdlib"), "body"))
        monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
        with pytest.raises(DataError, match="no Python sources under"):
            resolve("python_stdlib")


class TestLinks:
    @pytest.fixture
    def linked(self, tmp_path):
        """Two files in a directory, one in another that is linked into it."""
        for name in ("all/a.txt", "all/deep/b.txt", "elsewhere/c.txt"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(name)
        (tmp_path / "all/linked").symlink_to(tmp_path / "elsewhere")
        return tmp_path

    def test_linked_directories_are_followed(self, linked, caplog):
        assert names(resolve(str(linked / "all")), linked) == ["all/a.txt", "all/deep/b.txt", "all/linked/c.txt"]
        assert not caplog.text

    def test_a_link_to_what_it_lies_in_ends(self, linked, caplog):
        (linked / "elsewhere/back").symlink_to(linked / "all")
        assert len(resolve(str(linked / "all"))) == 3
        assert (
            f"left out {linked}/all/linked/back, a symbolic link to {linked}/all, which is read already" in caplog.text
        )

    def test_a_directory_by_two_names_is_read_once(self, linked, caplog):
        (linked / "all/a link to deep").symlink_to(linked / "all/deep")
        assert names(resolve(str(linked / "all")), linked) == ["all/a.txt", "all/deep/b.txt", "all/linked/c.txt"]
        assert "left out" in caplog.text and "a link to deep, a symbolic link to" in caplog.text

    @pytest.mark.parametrize("make", ["symlink_to", "hardlink_to"])
    def test_a_file_by_two_names_is_read_once(self, linked, make, caplog):
        getattr(linked / "all/z.txt", make)(linked / "all/a.txt")
        assert len(resolve(str(linked / "all"))) == 3
        assert "left out 1 files that are others by another name" in caplog.text
        caplog.clear()
        assert names(resolve(str(linked / "all/*.txt")), linked) == ["all/a.txt"]
        assert "left out 1 files" in caplog.text

    def test_names_of_one_directory_are_refused(self, linked):
        (linked / "again").symlink_to(linked / "all")
        for second in ("again", "all/deep", "again/a.txt"):
            with pytest.raises(DataError, match="names .* more than once"):
                resolve(str(linked / "all"), str(linked / second))

    def test_a_link_to_nothing_is_named(self, linked):
        (linked / "all/gone.txt").symlink_to(linked / "nowhere.txt")
        with pytest.raises(DataError, match=r"gone\.txt cannot be read: .* link to nothing"):
            resolve(str(linked / "all"))

    def test_validation_on_what_is_trained_on_is_said(self, linked, caplog):
        everything, part = (str(linked / "all"),), (str(linked / "elsewhere"),)
        say_if_counted_twice(DataSettings(train_files=everything, val_files=part))
        assert "data.val_files: 1 of 1 files are in data.train_files as well" in caplog.text
        caplog.clear()
        say_if_counted_twice(DataSettings(train_files=("python_stdlib",), val_files=part))
        say_if_counted_twice(DataSettings(train_files=everything))
        assert not caplog.text

    def test_copies_are_said(self, linked, caplog):
        for name in ("copy.txt", "other.txt"):
            (linked / "elsewhere" / name).write_text({"copy.txt": "all/a.txt", "other.txt": "all/b.txt"}[name])
        say_if_counted_twice(DataSettings(train_files=(str(linked / "all"),)))
        assert f"others ({linked}/all/linked/copy.txt that of {linked}/all/a.txt)" in caplog.text
        assert "1 of 5 files" in caplog.text
        train = (str(linked / "all/a.txt"),)
        for name, copied in (("copy", True), ("other", False)):
            caplog.clear()
            settings = DataSettings(train_files=train, val_files=(str(linked / f"elsewhere/{name}.txt"),))
            say_if_counted_twice(settings)
            assert ("data.val_files: 1 of 1 files are in data.train_files as well" in caplog.text) == copied
