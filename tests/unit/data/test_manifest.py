"""Reading manifests: both forms, places of entries, and everything that is not JSON."""

import json
from pathlib import Path

import pytest

from ds_higgs.data.manifest import read_entry, read_manifest
from ds_higgs.errors import UserError

SAMPLES = [{"messages": [{"role": "user", "content": f'سلام {index} "[{{,'}]} for index in range(7)]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_array_yields_entries_and_their_byte_ranges(tmp_path, indent, bom):
    text = json.dumps(SAMPLES, ensure_ascii=False, indent=indent)
    path = write(tmp_path / "train.json", bom + b"  \n" + text.encode() + b"\n")

    entries = list(read_manifest(path))

    assert [entry.data for entry in entries] == SAMPLES
    assert [entry.number for entry in entries] == list(range(7))
    assert [read_entry(path, entry.start, entry.end) for entry in entries] == SAMPLES


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_json_lines_number_lines_from_one_and_skip_blank_ones(tmp_path, bom):
    lines = [json.dumps(sample, ensure_ascii=False) for sample in SAMPLES[:3]]
    path = write(tmp_path / "train.jsonl", bom + f"{lines[0]}\n\n{lines[1]}\r\n{lines[2]}".encode())

    entries = list(read_manifest(path))

    assert [entry.number for entry in entries] == [1, 3, 4]
    assert [read_entry(path, entry.start, entry.end) for entry in entries] == SAMPLES[:3]


def test_lines_end_at_newlines_alone(tmp_path):
    samples = [{"audio_url": f"a{mark}b.wav"} for mark in "\u2028\u2029\u0085\x7f"]
    path = write(tmp_path / "train.jsonl", "\n".join(json.dumps(sample, ensure_ascii=False) for sample in samples))
    assert [entry.data for entry in read_manifest(path)] == samples


def test_a_broken_line_is_reported_and_the_rest_still_read(tmp_path):
    path = write(tmp_path / "train.jsonl", b'{"a": 1}\n{"a": 1\n{"b": "\xff"}\n{"c": 2}\n')

    entries = list(read_manifest(path))

    assert [entry.error is None for entry in entries] == [True, False, False, True]
    assert "malformed JSON at column 8" in entries[1].error
    assert "not UTF-8: byte 0xff at column 8" in entries[2].error


@pytest.mark.parametrize(
    ("content", "place", "reason"),
    [
        ('[\n {"a": 1},\n {"a" 2}\n]', "line 3, column 7", "Expecting ':' delimiter"),
        ('[{"a": 1}', "line 1, column 10", "the end of the file"),
        ('[{"a": "open', "line 1, column 8", "Unterminated string"),
        ("[1 2]", "line 1, column 4", "expected ','"),
        ("[1,]", "line 1, column 4", "Expecting value"),
        ("[1] x", "line 1, column 5", "text after the closing bracket"),
        (b'[1,\n"\xff"]', "line 2", "not UTF-8"),
        ("[" * 100_000, "line 1", "recursion"),
    ],
)
def test_a_broken_array_names_line_and_column(tmp_path, content, place, reason):
    path = write(tmp_path / "train.json", content)
    with pytest.raises(UserError, match=f"train.json, {place}.*{reason}"):
        list(read_manifest(path))


@pytest.mark.parametrize("content", [b"", b" \n\t", b"\xef\xbb\xbf\n"])
def test_an_empty_file_is_an_error(tmp_path, content):
    with pytest.raises(UserError, match="is empty"):
        list(read_manifest(write(tmp_path / "train.json", content)))


def test_a_missing_manifest_and_a_folder_are_errors(tmp_path):
    with pytest.raises(UserError, match=r"absent\.json: cannot read the manifest: No such file"):
        list(read_manifest(tmp_path / "absent.json"))
    with pytest.raises(UserError, match="cannot read the manifest: Is a directory"):
        list(read_manifest(tmp_path))


def test_nan_as_pandas_writes_it_is_null(tmp_path):
    path = write(tmp_path / "train.json", '[{"speaker": NaN}]')
    assert next(iter(read_manifest(path))).data == {"speaker": None}
