"""bin/concatenate.sh, run as a user runs it."""

import random
import re
import subprocess
from pathlib import Path

import pytest
from conftest import posix_only

pytestmark = posix_only
SCRIPT = Path(__file__).resolve().parent.parent / "bin/concatenate.sh"


@pytest.fixture
def books(tmp_path):
    folder = tmp_path / "books"
    folder.mkdir()
    return folder


def join(*args, cwd, status=0, script=SCRIPT):
    """Run the script and return its messages. An error must be one line."""
    words = ["bash", script, *args]
    result = subprocess.run(words, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True)
    messages = result.stderr.decode("utf-8")
    assert result.returncode == status, messages
    assert result.stdout == b""
    if status:
        assert messages.count("\n") == 1
    return messages


def joined_text(folder):
    """Join the books of a folder and return the text."""
    join(folder.name, "all.text", cwd=folder.parent)
    return (folder.parent / "all.text").read_bytes().decode("utf-8")


def test_downloaded_books_come_first_by_number_and_then_other_texts_by_name(books):
    in_order = ["9-z", "10-a", "10-b", "1234567890-c", "-e", "Zebra", "apple pie", "k=v", "三体"]
    for name in reversed(in_order):
        (books / f"{name}.txt").write_text(name, encoding="utf-8")
    assert joined_text(books) == "\n\n".join(in_order) + "\n"


def test_every_file_whose_name_ends_in_txt_is_a_book_and_no_other(books):
    (books / "1-a.txt").write_text("a")
    (books / "B.TXT").write_text("b")
    (books / "2-half.part").write_text("half")
    (books / "notes.md").write_text("notes")
    (books / "3-folder.txt").mkdir()
    assert joined_text(books) == "a\n\nb\n"


def test_the_name_of_a_folder_is_never_an_assignment_of_awk(tmp_path):
    (tmp_path / "x=y").mkdir()
    (tmp_path / "x=y/1-a.txt").write_text("a")
    assert joined_text(tmp_path / "x=y") == "a\n"


def test_an_earlier_output_among_the_books_is_not_a_book(books):
    (books / "1-a.txt").write_text("a")
    join("books", "books/all.txt", cwd=books.parent)
    join("books", "books/all.txt", cwd=books.parent)
    assert (books / "all.txt").read_text() == "a\n"


def test_any_text_is_joined_as_python_joins_it(books):
    generator = random.Random(0)
    pieces = ["a", "é", "“", "三", "🚀", " ", "\t", "\\", "&", "/", "\n", "\r\n", "\r", "\ufeff"]
    expected = []
    for number in range(10, 30):
        text = "\ufeff" + "".join(generator.choices(pieces, k=200)) + "."
        (books / f"{number}-x.txt").write_bytes(text.encode("utf-8"))
        expected.append(re.sub(r"\r*\n|\r", "\n", text.replace("\ufeff", "")) + "\n")
    assert joined_text(books) == "\n".join(expected)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_book_in_another_encoding_is_named_and_nothing_is_guessed(books, encoding):
    (books / "1-a.txt").write_text("good")
    (books / "my own.txt").write_bytes("Une fusée.\n".encode(encoding))
    message = join("books", "all.txt", cwd=books.parent, status=1)
    assert "books/my own.txt" in message
    assert not (books.parent / "all.txt").exists()
    assert (books / "my own.txt").read_bytes() == "Une fusée.\n".encode(encoding)


def test_the_printed_command_converts_a_book_when_the_encoding_is_filled_in(books):
    (books / "my own.txt").write_bytes("Une fusée.\n".encode("latin-1"))
    message = join("books", "all.txt", cwd=books.parent, status=1)
    command = re.search(r"iconv .*\.utf8", message)[0].replace("ENCODING", "LATIN1")
    subprocess.run(["bash", "-c", command], cwd=books.parent, check=True)
    assert (books / "my own.txt.utf8").read_text(encoding="utf-8") == "Une fusée.\n"


def test_one_nul_byte_in_a_text_is_named(books):
    (books / "1-a.txt").write_bytes(b"a good text with one \x00 in it\n" * 100)
    assert "NUL" in join("books", "all.txt", cwd=books.parent, status=1)


@pytest.mark.parametrize("folder", ["books", "missing"])
def test_without_books_it_says_what_to_run_and_that_training_works_anyway(books, folder):
    message = join(folder, "all.txt", cwd=books.parent, status=1)
    assert message.startswith("error: ")
    assert "python bin/download.py" in message
    assert "python train.py works without" in message


def test_a_failure_keeps_the_old_output_and_leaves_nothing_else(books):
    (books / "1-a.txt").write_text("a" * 100_000)
    (books.parent / "all.txt").write_text("old")
    # The limit on the size of a file fails like a full disk.
    command = 'trap "" XFSZ; ulimit -f 1; exec bash "$0" books all.txt'
    result = subprocess.run(["bash", "-c", command, SCRIPT], cwd=books.parent, capture_output=True)
    assert result.returncode != 0
    assert (books.parent / "all.txt").read_text() == "old"
    assert sorted(path.name for path in books.parent.iterdir()) == ["all.txt", "books"]


def test_an_output_that_is_a_folder_is_an_error(books):
    (books / "1-a.txt").write_text("a")
    assert "books is a folder" in join("books", "books", cwd=books.parent, status=1)
    assert [path.name for path in books.iterdir()] == ["1-a.txt"]


@pytest.mark.parametrize("args", [("a", "b", "c"), ("--help",)])
def test_wrong_arguments_end_with_the_usage_and_status_2(tmp_path, args):
    assert "usage" in join(*args, cwd=tmp_path, status=2)


def test_by_default_it_joins_the_books_of_the_project_from_any_working_directory(tmp_path):
    project = tmp_path / "a project"
    for folder in ("bin", "data/books", "elsewhere"):
        (project / folder).mkdir(parents=True)
    script = project / "bin/concatenate.sh"
    script.write_bytes(SCRIPT.read_bytes())
    (project / "data/books/1-a.txt").write_text("你好\n", encoding="utf-8")
    (project / "data/books/2-b.txt").write_text("x\n", encoding="utf-8")

    messages = join(cwd=project / "elsewhere", script=script)
    assert "2 books, 10 bytes" in messages
    assert messages.endswith("next: python train.py\n")
    assert (project / "data/scifi.txt").read_text(encoding="utf-8") == "你好\n\nx\n"


def test_after_another_output_the_printed_command_trains_on_it(books):
    (books / "1-a.txt").write_text("a")
    messages = join("books", "my text.txt", cwd=books.parent)
    assert messages.endswith("next: python train.py --data my\\ text.txt\n")
