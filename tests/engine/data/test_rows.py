"""Files become rows with their places: every kind, every name, streamed."""

import builtins
import gzip
import json
import time
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.data.formats import detect, examples
from engine.data.rows import Row, Rows, made_rows, open_rows
from engine.errors import DataError, ResourceError
from tests.engine.data.malformed import jsonl, parquet

VALUES = [
    {"prompt": "one", "completion": "1"},
    {"prompt": "two, or\n2\ttabs", "completion": '"2"'},
    {"prompt": "três \u2028 €", "completion": "😀"},
]
CSV = 'prompt,completion\none,1\n"two, or\n2\ttabs","""2"""\n"três \u2028 €",😀\n'
KINDS = {
    "a.jsonl": jsonl(*VALUES),
    "a.ndjson": jsonl(*VALUES),
    "lines.json": jsonl(*VALUES),
    "array.json": json.dumps(VALUES, indent=1, ensure_ascii=False).encode(),
    "flat.json": json.dumps(VALUES).encode(),
    "array.jsonl": ("[\n" + ",\n".join(map(json.dumps, VALUES)) + "\n]\n").encode(),
    "a.csv": CSV.encode(),
    "windows.csv": ("\ufeff" + CSV.replace("\n", "\r\n").replace("or\r\n", "or\n")).encode(),
    "semicolons.csv": CSV.replace("prompt,", "prompt;")
    .replace("one,", "one;")
    .encode()
    .replace(b'tabs",', b'tabs";')
    .replace('€",'.encode(), '€";'.encode()),
    "a.tsv": b'prompt\tcompletion\none\t1\n"two, or\n2\ttabs"\t"""2"""\n'
    + "três \u2028 €\t😀\n".encode(),
    "a.parquet": parquet(**{key: [value[key] for value in VALUES] for key in VALUES[0]}),
}


def values(rows):
    return [row.value for row in rows]


def places(rows):
    return [row.where.rpartition(":")[2] for row in rows]


@pytest.mark.parametrize("zipped", ["", ".gz"])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_has_the_same_rows(tmp_path, name, zipped):
    file = tmp_path / (name + zipped)
    file.write_bytes(gzip.compress(KINDS[name]) if zipped else KINDS[name])
    found = open_rows(str(file))
    assert list(found) == ["train"]
    assert values(found["train"]) == VALUES
    assert all(row.where.startswith(f"{name}{zipped}:") for row in found["train"])
    # A cell of CSV goes over two lines: rows are named by the line that they begin on.
    csv = name.endswith(("csv", "tsv"))
    assert places(found["train"]) == (["2", "3", "5"] if csv else ["1", "2", "3"])


@pytest.mark.parametrize("name", KINDS)
def test_a_pipe_is_known_by_its_first_bytes(tmp_path, name):
    for data in (KINDS[name], gzip.compress(KINDS[name])):
        (tmp_path / "copy").write_bytes(data)
        rows = open_rows("-", piped=tmp_path / "copy")["train"]
        assert values(rows) == VALUES
        assert next(iter(rows)).where.startswith("stdin:")


def test_a_pipe_of_prose_is_text(tmp_path):
    (tmp_path / "copy").write_text("Once, the text\nwas prompt.\n")
    rows = open_rows("-", piped=tmp_path / "copy")["train"]
    assert list(rows) == [Row(where="stdin", value={"text": "Once, the text\nwas prompt.\n"})]


def test_a_text_file_is_one_row(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf{not json}\r\n\n")
    rows = open_rows(str(tmp_path / "a.txt"))["train"]
    assert list(rows) == [Row(where="a.txt", value={"text": "{not json}\r\n\n"})]


def test_blank_lines_count_as_lines_but_are_no_rows(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\n{"a": 1}\n \r\n\n{"a": 2}')
    (tmp_path / "a.csv").write_bytes(b"\na\n\n1\n\n\n2\n")
    assert places(open_rows(str(tmp_path / "a.jsonl"))["train"]) == ["2", "5"]
    assert places(open_rows(str(tmp_path / "a.csv"))["train"]) == ["4", "7"]


def test_rows_can_be_read_again_and_side_by_side(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(*VALUES))
    rows = open_rows(str(tmp_path / "a.jsonl"))["train"]
    for one, other in zip(rows, rows, strict=True):
        assert one == other
    assert values(rows) == VALUES
    assert values(made_rows("made", lambda: iter(VALUES))) == VALUES


def test_a_bad_row_is_told_and_those_after_it_are_read(tmp_path):
    """In CSV and in a JSON array too, where it is less plain where a row ends."""
    (tmp_path / "a.jsonl").write_bytes(jsonl({"a": 1}, "{", {"a": 3}))
    (tmp_path / "a.json").write_bytes(b'[{"a": 1}, {"a": NaN}, {"a": 3}]')
    (tmp_path / "a.csv").write_bytes(b'a\n1\n"2"x\n3\n')
    for name in ("a.jsonl", "a.json", "a.csv"):
        good, bad, after = open_rows(str(tmp_path / name))["train"]
        assert (int(good.value["a"]), bad.value, int(after.value["a"])) == (1, None, 3)
        assert bad.problem.startswith("not valid") and not after.problem


@given(
    st.lists(
        st.dictionaries(
            st.text(), st.none() | st.integers() | st.text() | st.lists(st.booleans()), max_size=3
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([None, 1]),
    st.booleans(),
)
def test_any_json_reads_as_json_reads_it(tmp_path_factory, rows, indent, ascii):
    """The oracle is `json.dumps`: lines and arrays, one line or many, escaped or not."""
    folder = tmp_path_factory.mktemp("any")
    array = json.dumps(rows, indent=indent, ensure_ascii=ascii)
    (folder / "a.json").write_text(array, encoding="utf-8", newline="")
    lines = "\n".join(json.dumps(row, ensure_ascii=ascii) for row in rows)
    (folder / "a.jsonl").write_text(lines, encoding="utf-8", newline="")
    assert values(open_rows(str(folder / "a.json"))["train"]) == rows
    assert values(open_rows(str(folder / "a.jsonl"))["train"]) == rows


@given(st.binary(max_size=60), st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt"]))
def test_any_bytes_are_rows_or_a_data_error(tmp_path_factory, data, name):
    file = tmp_path_factory.mktemp("any") / name
    file.write_bytes(b'[{"text": "' + data if len(data) % 2 else data)
    try:
        rows = open_rows(str(file))["train"]
        list(examples(rows, detect(rows).format))
    except DataError as error:
        assert str(error)


def folder_of(tmp_path, *names):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        data = jsonl({"text": name})
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return open_rows(str(tmp_path))


@pytest.mark.parametrize(
    "names, split",
    [
        (["train.jsonl", "valid.jsonl", "test.json"], ["train", "valid", "test"]),
        (["train.jsonl.gz", "val.jsonl"], ["train", "valid"]),
        (["data/Train-00000-of-00001.jsonl", "data/validation.jsonl"], ["train", "valid"]),
        (["train/a.jsonl", "dev/test.jsonl"], ["train", "valid"]),
    ],
)
def test_a_folder_is_read_by_the_names_in_it(tmp_path, names, split):
    found = folder_of(tmp_path, *names, "notes.txt", ".train.jsonl", "train.log")
    assert {key: list(rows.files) for key, rows in found.items()} == {
        key: [name] for key, name in zip(split, names, strict=True)
    }
    assert [row.where for row in found["valid"]] == [f"{names[1]}:1"]


def test_another_folder_is_all_for_training_in_a_fixed_order(tmp_path):
    names = ["b.jsonl", "a/trainer.jsonl", "a/a.jsonl", "validity.json"]
    rows = folder_of(tmp_path, *names, "a/README.md")["train"]
    assert rows.files == ("a/a.jsonl", "a/trainer.jsonl", "b.jsonl", "validity.json")
    assert places(rows) == ["1"] * 4


def test_a_glob_takes_what_it_matches(tmp_path, monkeypatch):
    folder_of(tmp_path, "a/1.jsonl", "a/2.jsonl", "a/3.json")
    monkeypatch.chdir(tmp_path)
    assert open_rows("a/*.jsonl")["train"].files == ("a/1.jsonl", "a/2.jsonl")


@pytest.mark.parametrize(
    "source, message",
    [
        ("", "no rows named; data.train takes"),
        ("nowhere.jsonl", "nowhere.jsonl: no such file, folder or pattern"),
        ("no*.jsonl", "no such file, folder or pattern"),
        ("a\0b", "no such file, folder or pattern"),
        ("/dev/null", "/dev/null: not a file that can be read twice"),
    ],
)
def test_a_source_that_leads_nowhere_is_named(source, message):
    with pytest.raises(DataError) as caught:
        open_rows(source)
    assert message in str(caught.value)


def test_a_folder_without_rows_or_without_training_rows_is_named(tmp_path):
    (tmp_path / "README.md").write_text("nothing here")
    with pytest.raises(DataError, match=r"no file of rows in this folder; they end in \.jsonl"):
        open_rows(str(tmp_path))
    with pytest.raises(DataError, match="files named valid but none named train"):
        folder_of(tmp_path, "dev.jsonl")


def test_a_file_that_goes_away_or_is_no_longer_readable_is_named(tmp_path):
    for name in ("a.jsonl", "a.parquet"):
        (tmp_path / name).write_bytes(KINDS[name])
        rows = open_rows(str(tmp_path / name))["train"]
        (tmp_path / name).unlink()
        with pytest.raises(DataError, match=rf"{name}: cannot be read: No such file"):
            list(rows)


def test_parquet_rows_hold_lists_and_objects(tmp_path):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "a.parquet").write_bytes(parquet(messages=[talk] * 600))
    rows = list(open_rows(str(tmp_path / "a.parquet"))["train"])
    assert rows[-1] == Row(where="a.parquet:600", value={"messages": talk})


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(KINDS["a.parquet"])
    rows = open_rows(str(tmp_path / "a.parquet"))["train"]
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ResourceError, match="pip install"):
        list(rows)


MANY = 100_000


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_a_hundred_thousand_rows_take_seconds(tmp_path, name):
    file = tmp_path / name
    write_many(file, MANY)
    rows = open_rows(str(file))["train"]
    start = time.perf_counter()
    assert detect(rows).counts == {"prompt": MANY}
    assert sum(1 for _ in examples(rows, "prompt")) == MANY
    assert time.perf_counter() - start < 10  # measured on one core: 2 to 3.5


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet"])
def test_memory_does_not_grow_with_the_rows(tmp_path, name):
    """The control is the same rows kept in a list."""
    file = tmp_path / name
    write_many(file, 20_000)
    rows = open_rows(str(file))["train"]
    tracemalloc.start()
    for _ in examples(rows, "prompt"):
        pass
    streamed = tracemalloc.get_traced_memory()[1]
    kept = list(examples(rows, "prompt"))
    in_memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(kept) == 20_000 and in_memory > 8e6
    assert streamed < 2e6


def write_many(file, count):
    prompts = [f"question {number} " + "x" * 200 for number in range(count)]
    if file.suffix == ".parquet":
        columns = {"prompt": prompts, "completion": ["answer"] * count}
        pyarrow.parquet.write_table(pyarrow.table(columns), file)
        return
    lines = [json.dumps({"prompt": prompt, "completion": "answer"}) for prompt in prompts]
    if file.suffix == ".csv":
        lines = ["prompt,completion", *(f'"{prompt}",answer' for prompt in prompts)]
    data = "\n".join(lines).encode()
    file.write_bytes(gzip.compress(data, 1) if file.suffix == ".gz" else data)


def test_no_rows_at_all_is_an_error():
    with pytest.raises(DataError, match="^made: no rows in it"):
        list(made_rows("made", lambda: []))
    with pytest.raises(DataError, match="^other: no rows in it"):
        list(Rows(name="other", read=lambda: iter(())))
