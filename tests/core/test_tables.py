"""One way to write a table."""

import io
import math

from rich.console import Console

from tdm_lightning.core import tables

HEADER, ROWS = ["method", "rate", "top-1"], [["TDM", "0.7", "96.1"], ["plain", "", "97.5"]]


def test_markdown():
    assert tables.markdown(HEADER, ROWS, left=2).splitlines() == [
        "| method | rate | top-1 |",
        "| --- | --- | ---: |",
        "| TDM | 0.7 | 96.1 |",
        "| plain |  | 97.5 |",
    ]


def test_a_terminals_table_has_the_same_cells():
    file = io.StringIO()
    Console(file=file, width=60).print(tables.terminal(HEADER, ROWS))
    lines = file.getvalue().splitlines()
    assert [cell.strip() for cell in lines[3].split("│")[1:-1]] == ROWS[0]
    assert lines[3].rstrip("│ ").endswith("96.1")


def test_csv_reads_back_what_was_written_and_added(tmp_path):
    path = tmp_path / "t.csv"
    tables.write_csv(path, [{"a": "x, y", "b": 0.5}, {"a": "", "b": math.nan}])
    tables.append_csv(path, {"a": "z", "b": 2})
    assert path.read_bytes() == b'a,b\n"x, y",0.5\n,\nz,2\n'
    assert tables.read_csv(path) == [
        {"a": "x, y", "b": "0.5"},
        {"a": "", "b": ""},
        {"a": "z", "b": "2"},
    ]


def test_csv_that_was_broken_off(tmp_path):
    path = tmp_path / "t.csv"
    assert tables.read_csv(path) == []
    tables.append_csv(path, {"a": 1})
    with path.open("a") as file:
        file.write("2")
    assert tables.read_csv(path) == [{"a": "1"}]
