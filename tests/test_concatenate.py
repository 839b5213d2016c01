"""bin/concatenate.sh, run as a user runs it."""

import random
import re
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "bin/concatenate.sh"
BYTE_ORDER_MARK = "\ufeff"


def run_script(*args, cwd, before=""):
    """Run the script, after some shell commands in the same process."""
    command = f'{before}\nexec bash "$0" "$@"'
    words = ["bash", "-c", command, SCRIPT, *args]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=30)


def make_books(folder, books):
    """Write files, given by name as text or bytes, into a new folder."""
    folder.mkdir()
    for name, content in books.items():
        data = content if isinstance(content, bytes) else content.encode("utf-8")
        (folder / name).write_bytes(data)


def read_text(path):
    return path.read_bytes().decode("utf-8")


def error_of(result, status):
    """Return the error message of a run that must fail with this status and one line."""
    assert result.returncode == status
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


# ---- The order and the blank lines


def test_books_come_by_number_and_then_own_texts_by_name(tmp_path):
    in_order = ["9-z", "10-a", "10-b", "100-c", "78807-d", "1234567890-e"]
    in_order += ["-dash", "3", "Zebra", "apple pie", 'it\'s "q"', "三体"]
    make_books(tmp_path / "books", {f"{name}.txt": f"{name}\n" for name in reversed(in_order)})
    assert run_script("books", "all.txt", cwd=tmp_path).returncode == 0
    assert read_text(tmp_path / "all.txt") == "\n\n".join(in_order) + "\n"


@pytest.mark.parametrize("end", ["", "\n"])
def test_one_blank_line_stands_between_books_and_none_at_the_end(tmp_path, end):
    make_books(tmp_path / "books", {"1-a.txt": "one" + end, "2-b.txt": "two" + end})
    run_script("books", "all.txt", cwd=tmp_path)
    assert read_text(tmp_path / "all.txt") == "one\n\ntwo\n"


def test_it_says_how_many_books_and_bytes_and_what_comes_next(tmp_path):
    make_books(tmp_path / "books", {"1-a.txt": "你好\n", "2-b.txt": "x\n"})
    result = run_script("books", "all.txt", cwd=tmp_path)
    assert result.stdout == ""
    assert "2 books, 10 bytes" in result.stderr
    assert "python train.py" in result.stderr


# ---- Which files are books


def test_only_complete_text_files_are_joined(tmp_path):
    make_books(tmp_path / "books", {"1-a.txt": "whole\n", ".2.7.part": "half", "notes.md": "no"})
    (tmp_path / "books/3-folder.txt").mkdir()
    run_script("books", "all.txt", cwd=tmp_path)
    assert read_text(tmp_path / "all.txt") == "whole\n"


def test_an_earlier_result_among_the_books_is_not_a_book(tmp_path):
    make_books(tmp_path / "books", {"1-a.txt": "a\n"})
    run_script("books", "books/all.txt", cwd=tmp_path)
    run_script("books", "books/all.txt", cwd=tmp_path)
    assert read_text(tmp_path / "books/all.txt") == "a\n"


def test_names_that_look_like_options_are_names(tmp_path):
    make_books(tmp_path / "-n", {"-e.txt": "a\n"})
    assert run_script("-n", "-o", cwd=tmp_path).returncode == 0
    assert read_text(tmp_path / "-o") == "a\n"


@pytest.mark.parametrize("folder", ["empty", "missing"])
def test_without_books_it_says_what_to_run_and_that_training_works_anyway(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    message = error_of(run_script(folder, "all.txt", cwd=tmp_path), 1)
    assert "python bin/download.py" in message
    assert "python train.py" in message
    assert not (tmp_path / "all.txt").exists()


# ---- Encodings and line ends


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r", "\r\r\n"])
@pytest.mark.parametrize("mark", ["", BYTE_ORDER_MARK])
def test_every_line_end_becomes_a_line_feed_and_byte_order_marks_go(tmp_path, mark, line_end):
    lines = ["first", "  second “quoted”", "", "last"]
    text = mark + "".join(line + line_end for line in lines)
    make_books(tmp_path / "books", {"1-a.txt": text, "2-b.txt": text})
    assert run_script("books", "all.txt", cwd=tmp_path).returncode == 0
    book = "\n".join(lines) + "\n"
    assert read_text(tmp_path / "all.txt") == book + "\n" + book


def test_any_text_is_joined_as_python_would_join_it(tmp_path):
    generator = random.Random(0)
    pieces = ["a", "é", "“", "三", "🚀", " ", "\t", "\\", "&", "/", "\n", "\r\n", "\r", "\ufeff"]
    books = {}
    for number in range(10, 30):
        characters = generator.choices(pieces, k=200)
        books[f"{number}-x.txt"] = "".join(characters) + "."
    make_books(tmp_path / "books", books)

    run_script("books", "all.txt", cwd=tmp_path)
    clean = []
    for text in books.values():
        clean.append(re.sub(r"\r*\n|\r", "\n", text.replace(BYTE_ORDER_MARK, "")) + "\n")
    assert read_text(tmp_path / "all.txt") == "\n".join(clean)


OTHER_ENCODINGS = {
    "UTF-16 with a mark": ("UTF-16", "utf-16"),
    "UTF-16, little-endian": ("UTF-16LE", "utf-16-le"),
    "UTF-16, big-endian": ("UTF-16BE", "utf-16-be"),
    "UTF-32 with a mark": ("UTF-32", "utf-32"),
    "Latin-1": ("WINDOWS-1252", "latin-1"),
    "Windows-1252": ("WINDOWS-1252", "cp1252"),
}


@pytest.mark.parametrize(
    ("name", "python_name"), OTHER_ENCODINGS.values(), ids=OTHER_ENCODINGS.keys()
)
def test_a_book_that_is_not_utf8_is_refused_and_the_command_in_the_error_converts_it(
    tmp_path, name, python_name
):
    text = "Une fusée, très loin.\n"
    make_books(tmp_path / "books", {"1-a.txt": "good\n", "my own.txt": text.encode(python_name)})
    message = error_of(run_script("books", "all.txt", cwd=tmp_path), 1)
    assert "books/my own.txt" in message
    assert f"iconv -f {name} -t UTF-8" in message
    assert not (tmp_path / "all.txt").exists()

    command = message[message.index("iconv") :]
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    assert run_script("books", "all.txt", cwd=tmp_path).returncode == 0
    assert read_text(tmp_path / "all.txt") == "good\n\n" + text


# ---- Failures


@pytest.mark.parametrize("output", ["missing/all.txt", "books/1-a.txt/all.txt", "books"])
def test_an_output_that_cannot_be_written_is_one_line(tmp_path, output):
    make_books(tmp_path / "books", {"1-a.txt": "a\n"})
    error_of(run_script("books", output, cwd=tmp_path), 1)


@pytest.mark.parametrize("before", ['trap "" XFSZ; ulimit -f 1', "ulimit -f 1"])
def test_a_failure_keeps_the_old_result_and_leaves_nothing_else(tmp_path, before):
    make_books(tmp_path / "books", {"1-a.txt": "a" * 100_000})
    (tmp_path / "all.txt").write_text("old", encoding="utf-8")
    error_of(run_script("books", "all.txt", cwd=tmp_path, before=before), 1)
    assert read_text(tmp_path / "all.txt") == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.txt", "books"]


@pytest.mark.parametrize("args", [("a", "b", "c"), ("",), ("books", "")])
def test_wrong_arguments_end_with_status_2(tmp_path, args):
    assert "usage" in error_of(run_script(*args, cwd=tmp_path), 2)


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_on_standard_output(tmp_path, flag):
    result = run_script(flag, cwd=tmp_path)
    assert result.returncode == 0
    assert "usage" in result.stdout
    assert result.stderr == ""


def test_the_script_uses_nothing_that_bash_3_or_the_tools_of_macos_lack():
    code = SCRIPT.read_text(encoding="utf-8")
    newer = ["mapfile", "readarray", "declare -A", "local -A", "sort -z", "sort -V", ",,}", "^^}"]
    newer += ["sed -i", "sed -z", "grep -P", "head -z", "readlink -f", "|&", "&>>", "coproc"]
    assert [word for word in newer if word in code] == []
