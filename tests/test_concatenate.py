"""What bin/concatenate.sh promises, seen from outside."""

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "bin/concatenate.sh"


def run(*args, cwd):
    return subprocess.run(["bash", SCRIPT, *args], cwd=cwd, capture_output=True, text=True, timeout=30)


def fill(folder, books):
    folder.mkdir()
    for name, text in books.items():
        (folder / name).write_bytes(text.encode())
    return folder


def fails(result, status):
    assert result.returncode == status and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr


def test_books_stand_by_number_then_name_and_own_files_follow(tmp_path):
    in_order = [
        "9-z",
        "10-a",
        "10-b",
        "100-c",
        "78807-d",
        "-dash",
        "3",
        "Zebra",
        "apple pie",
        'it\'s "q"',
        "三体",
    ]
    fill(tmp_path / "books", {f"{name}.txt": f"{name}\n" for name in reversed(in_order)})
    assert run("books", "all.txt", cwd=tmp_path).returncode == 0
    assert (tmp_path / "all.txt").read_text().split("\n\n") == [*in_order[:-1], in_order[-1] + "\n"]


@pytest.mark.parametrize("end", ["", "\n"])
def test_one_blank_line_stands_between_books_and_none_at_the_end(tmp_path, end):
    fill(tmp_path / "books", {"1-a.txt": "one" + end, "2-b.txt": "two" + end})
    run("books", "all.txt", cwd=tmp_path)
    assert (tmp_path / "all.txt").read_bytes() == b"one\n\ntwo\n"


def test_it_says_how_many_books_and_bytes(tmp_path):
    fill(tmp_path / "books", {"1-a.txt": "你好\n", "2-b.txt": "x\n"})
    result = run("books", "all.txt", cwd=tmp_path)
    assert result.stdout == "" and "2 books, 10 bytes" in result.stderr


def test_only_whole_text_files_are_joined(tmp_path):
    folder = fill(tmp_path / "books", {"1-a.txt": "whole\n", ".2.7.part": "half", "notes.md": "no"})
    (folder / "3-folder.txt").mkdir()
    run("books", "all.txt", cwd=tmp_path)
    assert (tmp_path / "all.txt").read_text() == "whole\n"


def test_an_earlier_result_among_the_books_is_no_book(tmp_path):
    fill(tmp_path / "books", {"1-a.txt": "a\n"})
    for _ in range(2):
        assert run("books", "books/all.txt", cwd=tmp_path).returncode == 0
    assert (tmp_path / "books/all.txt").read_text() == "a\n"


def test_names_that_look_like_options_are_names(tmp_path):
    fill(tmp_path / "-n", {"-e.txt": "a\n"})
    assert run("-n", "-o", cwd=tmp_path).returncode == 0
    assert (tmp_path / "-o").read_text() == "a\n"


@pytest.mark.parametrize("folder", ["empty", "missing"])
def test_without_books_it_says_what_to_run_first(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    assert "python bin/download.py" in fails(run(folder, "all.txt", cwd=tmp_path), 1)
    assert not (tmp_path / "all.txt").exists()


@pytest.mark.parametrize("output", ["missing/all.txt", "books/1-a.txt/all.txt", "books"])
def test_an_output_that_cannot_be_written_is_one_line(tmp_path, output):
    fill(tmp_path / "books", {"1-a.txt": "a\n"})
    fails(run("books", output, cwd=tmp_path), 1)


def test_a_failure_leaves_the_old_result_and_nothing_beside(tmp_path):
    fill(tmp_path / "books", {"1-a.txt": "a" * 100_000})
    (tmp_path / "all.txt").write_text("old")
    limit = 'trap "" XFSZ; ulimit -f 1; exec bash "$0" books all.txt'
    fails(
        subprocess.run(
            ["bash", "-c", limit, SCRIPT], cwd=tmp_path, capture_output=True, text=True, timeout=30
        ),
        1,
    )
    assert (tmp_path / "all.txt").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.txt", "books"]


@pytest.mark.parametrize("args", [("a", "b", "c"), ("",), ("books", "")])
def test_wrong_arguments_are_status_2(tmp_path, args):
    assert "usage" in fails(run(*args, cwd=tmp_path), 2)


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_on_standard_output(tmp_path, flag):
    result = run(flag, cwd=tmp_path)
    assert result.returncode == 0 and "usage" in result.stdout and result.stderr == ""
