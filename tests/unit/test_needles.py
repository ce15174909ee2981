"""The byte search: an id is found in every kind of file, and nowhere else."""

import gzip
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from couponflow.errors import ConfigError
from couponflow.lake import needles
from couponflow.lake.needles import Needles

ID = "customer-17"
FOUND = Needles((ID, "f00d" * 16))


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def parquet(column: str, values: Any, kind: Any = None, **options: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({column: pa.array(values, kind)}), out, **options)
    return out.getvalue()


def hits(folder: Path, found: Needles = FOUND) -> dict[str, str]:
    return {str(Path(uri).relative_to(folder)): where for uri, where in needles.search(str(folder), found)}


def test_every_kind_of_file_is_read(tmp_path: Path) -> None:
    many = [None, *(hashlib.sha256(bytes([n])).hexdigest() for n in range(250)), ID]
    nested = [[{"a": "x", "b": ID}], None]
    mapped: Any = [[("k", ID)], []]
    texts = {"compression": "zstd", "use_dictionary": True, "write_statistics": False}
    holding = {
        "runs/r.json": json.dumps({"error": f"no {ID}!"}).encode(),
        "tables/t/_delta_log/0.json": b'{"predicate":"user_id = \'' + ID.encode() + b"'\"}",
        "log.gz": gzip.compress(b"of " + ID.encode()),
        "text.parquet": parquet("user_id", many, **texts),
        "dictionary.parquet": parquet("x", pa.array([ID, "b"]).dictionary_encode(), None, **texts),
        "nested.parquet": parquet("x", nested, None, **texts),
        "map.parquet": parquet("x", mapped, pa.map_(pa.string(), pa.string()), **texts),
        "binary.parquet": parquet("x", [b"\0" + ID.encode() + b"\0"], None, **texts),
        "example.parquet": parquet("example_id", [f"18:{ID}:2024-01-10"], None, **texts),
        "pseudonym.parquet": parquet("user_id", ["f00d" * 16], None, **texts),
        "snappy.parquet": parquet("user_id", [ID], None, compression="snappy"),
        f"of-{ID}.txt": b"",
        "cut.parquet": parquet("user_id", ["someone-else-entirely"] * 50)[:-20],
        "cut.gz": gzip.compress(b"x" * 100)[:-4],
        ".hidden.json.x1": ID.encode(),
    }
    clean = {
        "longer.parquet": parquet("user_id", [f"{ID}1", f"x{ID}"], None, **texts),
        "longer.json": f'"{ID}1", "a{ID}"'.encode(),
        "empty.parquet": parquet("user_id", [], pa.string()),
        "empty": b"",
        "neighbours.parquet": parquet("x", ["custo", "mer-17"], None, use_dictionary=False),
    }
    for name, content in (holding | clean).items():
        write(tmp_path / name, content)
    found = hits(tmp_path)
    assert set(found) == set(holding)
    assert ID.encode() not in holding["text.parquet"]  # only decoding shows it
    assert found["text.parquet"] == "column user_id"
    assert found["cut.parquet"] == "unknown: not readable as Parquet"
    assert hits(tmp_path / "absent") == {}


def test_statistics_in_a_footer_are_read(tmp_path: Path) -> None:
    """Smallest and largest value stand in the footer as they are."""
    content = parquet("user_id", ["a", ID], None, compression="zstd")
    assert FOUND.in_value(pq.read_metadata(io.BytesIO(content)).row_group(0).column(0).statistics.max, "x")


@pytest.mark.parametrize("user_id", ["17", "123456789", "abc"])
def test_a_plain_id_is_only_a_user_column_s_value(tmp_path: Path, user_id: str) -> None:
    plain = Needles((user_id,))
    assert plain.is_plain
    write(tmp_path / "a.json", f'{{"quantity": {user_id}, "item_id": "{user_id}"}}'.encode())
    write(tmp_path / "b.json", f'{{"user_id": "{user_id}"}}'.encode())
    write(tmp_path / "c.parquet", parquet("user_id", [user_id, "x"]))
    write(tmp_path / "d.parquet", parquet("item_id", [user_id, "x"]))
    assert hits(tmp_path, plain) == {"b.json": "its bytes", "c.parquet": "column user_id"}
    assert plain.redacted(b'{"user_id" : "%b", "n": %b}' % ((user_id.encode(),) * 2)) == (
        b'{"user_id" : "erased", "n": %b}' % user_id.encode()
    )


def test_ids_are_found_as_they_are_written() -> None:
    odd = Needles(('Zoë "Z" /1',))
    for text in (json.dumps('Zoë "Z" /1'), 'Zoë "Z" /1', '"Zoë ""Z"" /1"', "Zo%C3%AB%20%22Z%22%20%2F1"):
        assert odd.in_bytes(text.encode()), text
    assert not FOUND.is_plain
    assert repr(FOUND) == "Needles()"


@pytest.mark.parametrize("user_id", ["", "  ", "a\nb", "x" * 1001])
def test_what_is_no_id_is_refused(user_id: str) -> None:
    with pytest.raises(ConfigError, match="expected one id"):
        Needles((user_id,))


def test_texts_lose_the_id_and_keep_the_rest(tmp_path: Path) -> None:
    write(tmp_path / "runs" / "r.json", f'{{"error": "no {ID}, no {ID}1"}}'.encode())
    write(tmp_path / "runs" / ".r.json.x1", ID.encode())
    write(tmp_path / "runs" / "other.json", b"{}")
    write(tmp_path / "raw" / "a.jsonl", ID.encode())
    write(tmp_path / "raw" / ".a.jsonl.x1", ID.encode())
    write(tmp_path / "model.bin", ID.encode())
    changed = needles.redact(str(tmp_path), FOUND, (".json", ".jsonl"), ("raw/",))
    assert [Path(uri).name for uri in changed] == [".a.jsonl.x1", ".r.json.x1", "r.json"]
    assert json.loads((tmp_path / "runs" / "r.json").read_text()) == {"error": f"no erased, no {ID}1"}
    assert not (tmp_path / "runs" / ".r.json.x1").exists()
    assert (tmp_path / "raw" / "a.jsonl").read_bytes() == ID.encode()
    assert needles.redact(str(tmp_path), FOUND, (".json", ".jsonl"), ("raw/",)) == []
