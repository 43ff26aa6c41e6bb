"""JSON that was altered: what is read of it, what is refused, and in which words."""

import json
import os

import pytest

from mff_min.errors import UserError
from mff_run import jsonfile
from mff_run.jsonfile import is_path, misfit, parse_json, read_json, read_lines
from mff_run.log import Log, read_log
from mff_run.world import World


@pytest.mark.parametrize("content, message", [
    (b"", "cannot be read: Expecting value: line 1"), (b'{"a": 1',
                                                       "cannot be read: Expecting ',' delimiter: line 1"),
    (b"[1]", "holds a list: expected an object"), (b"null", "holds null: expected an object"),
    (b'{"a": 1, "a": 2}', "cannot be read: it names a twice"),
    (b'{"\xff": 1}', "cannot be read: it is no UTF-8"),
    ("{}".encode("utf-16"), "cannot be read: it is no UTF-8"),
    (b"[" * 10 ** 6, "it is nested too deeply"), (b'{"a": ' + b"[" * 60 + b"]" * 60 + b"}",
                                                  "nested too deeply"),
    (b"{}", "holds an object without a: expected one"), (b'{"a": true}',
                                                         "holds a: true: expected a whole number"),
    (b'{"a": "\\u001b[31m"}', 'holds a: "\\u001b[31m": expected a whole number'),
    (b'{"a": ' + b"9" * 5000 + b"}", "holds a: Infinity: expected a whole number"),
    (b'{"a": 1, "rows": [{"b": 1}, {"b": NaN}]}', "holds rows[1].b: NaN: expected a number below 1e+30"),
])
def test_a_file_that_is_not_meant_is_refused_in_a_line_with_its_name_and_the_way_on(tmp_path, content,
                                                                                    message):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as refused:
        read_json(path, {"a": int, "rows?": [{"b": float}]}, "move it away")
    said = str(refused.value)
    assert message in said and said.startswith(str(path)) and said.endswith("move it away")
    assert said.isprintable() and len(said) < 300


def test_a_mark_of_utf_8_in_front_and_spaces_are_no_fault(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf {"a": 1}\r\n')
    assert read_json(tmp_path / "a.json") == {"a": 1}


@pytest.mark.parametrize("make, message", [
    (os.mkfifo, "is no plain file: expected one"), (os.mkdir, "is no plain file"),
    (lambda path: path.symlink_to("/dev/zero"), "is no plain file"),
    (lambda path: path.symlink_to(path.parent / "nowhere"), "cannot be read: No such file or directory"),
    (lambda path: path.touch() or os.truncate(path, 2 ** 40), "has 1099511627776 bytes: expected"),
])
@pytest.mark.parametrize("read", [read_json, lambda path: list(read_lines(path))])
def test_pipes_folders_devices_and_sparse_files_are_refused_before_they_are_read(tmp_path, make, message,
                                                                                 read):
    make(tmp_path / "a.json")
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.json")


def test_a_line_that_has_no_end_is_refused_with_its_number(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b"{}\n" + b"x" * (jsonfile.MOST_LINE + 1))
    with pytest.raises(UserError,
                       match="log.jsonl has over 1048576 bytes in line 2: expected JSON; remove the line"):
        read_log(tmp_path / "log.jsonl")


@pytest.mark.parametrize("value, kind", [
    (1, int), (1, float), (0.5, float), ("a", (int, str)), ([], [int]), ([1, 2], [int]),
    ({"a": 1, "b": 2}, {"a": int}),
    ({}, {"a?": int}), (None, (int, type(None))), ("a/b", is_path), ("\udcff", is_path),
])
def test_what_is_of_its_kind_fits(value, kind):
    assert misfit(value, kind) == ""


@pytest.mark.parametrize("value, kind, words", [
    (True, int, "true: expected a whole number"), (1.0, int, "1.0: expected a whole number"),
    (float("inf"), float, "Infinity: expected a number"), (1e30, float,
                                                           "1e+30: expected a number below 1e+30"),
    ("1", float, '"1": expected a number'), ([1, "x"], [int], 'a[1]: "x": expected'),
    ({}, {"b": int}, "a without b"),
    ({"b": None}, {"b?": int}, "a.b: null: expected a whole number"), (1, (str, list), "1: expected a list"),
    ("\0", is_path, "expected a path"), ("\ud800", is_path, "expected a path"),
    (7, is_path, "7: expected a path"),
])
def test_what_is_of_another_kind_is_told_with_its_place(value, kind, words):
    assert words in misfit(value, kind, "a")


FOREIGN = [b"looks good", b'{"note": 1}', b"[1]", b'{"step": "four"}', b"\xff\xfe", b"[" * 10 ** 5,
           b"9" * 5000,
           b'{"step": 1, "step": 2}', b'{"step": 1e400}', b'  {"note":  "spaces stay"}  ']


def test_lines_of_others_stay_in_a_resumed_log_to_the_byte_and_a_torn_one_does_not(tmp_path):
    path, world = tmp_path / "log.jsonl", World(0, 1, 0, "cpu")
    ours = [json.dumps(dict(step=step, lr=0.1)).encode() for step in (1, 2, 3)]
    path.write_bytes(b"\n".join([ours[0], *FOREIGN, ours[1], ours[2], b'{"done": true, "step": 3}',
                                 b'{"ste']))
    log = Log(tmp_path, world, 2)
    assert path.read_bytes().split(b"\n") == [ours[0], *FOREIGN, ours[1], b""]
    log.write(step=3, lr=0.1)
    assert [line["step"] for line in read_log(path) if line.get("lr")] == [1, 2, 3]


def test_objects_can_be_replaced_while_they_are_parsed():
    """The innermost first: what takes their place is what the outer ones hold."""
    content = b'{"a": {"b": 1}, "c": [{"d": 2}, 3]}'
    assert parse_json(content, made=lambda found: [*found.values()]) == [[1], [[2], 3]]
    assert parse_json(content) == {"a": {"b": 1}, "c": [{"d": 2}, 3]}
