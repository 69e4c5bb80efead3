"""Parquet files that are damaged."""

import pytest

from memcache_jax.training.parquet import read_row_group, rows_of_groups


def test_damage_anywhere_names_the_file_in_one_line(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"text {i}" for i in range(500)]}), path)
    good = path.read_bytes()
    told = []
    for place in range(4, len(good), 23):
        path.write_bytes(good[:place] + b"\xff" * 8 + good[place + 8 :])
        try:
            assert rows_of_groups(path, "text") == [500]
            assert len(read_row_group(path, 0, "text")) == 500
        except ValueError as e:
            told.append(str(e))
    assert len(told) > 20
    assert all(text.startswith(f"{path} ") and "\n" not in text for text in told)
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError, match=r"a\.parquet is damaged, or no Parquet file: "):
        rows_of_groups(path, "text")
