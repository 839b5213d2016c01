"""bin/concatenate.sh, run as a user runs it."""

import random
import re
import subprocess

import pytest
from conftest import ROOT, posix_only

pytestmark = posix_only
SCRIPT = ROOT / "bin/concatenate.sh"


@pytest.fixture
def books(tmp_path):
    folder = tmp_path / "my books"
    folder.mkdir()
    return folder


def join(books, *, output="all.text", status=0):
    """Join the books of a folder, and return the messages. An error must be one line."""
    command = ["bash", SCRIPT, books.name, output]
    result = subprocess.run(command, cwd=books.parent, capture_output=True, encoding="utf-8")
    assert result.returncode == status, result.stderr
    assert result.stdout == ""
    if status:
        assert re.fullmatch("error: .*\n", result.stderr)
    return result.stderr


def joined_text(books):
    join(books)
    return (books.parent / "all.text").read_bytes().decode("utf-8")


def test_your_own_texts_come_first_by_name_and_then_downloaded_books_by_number(books):
    in_order = ["Zebra", "apple pie", "k=v", "三体", "9-z", "10-a", "10-b", "1234567890-c"]
    for name in in_order:
        (books / f"{name}.txt").write_text(name, encoding="utf-8")
    assert joined_text(books) == "\n\n".join(in_order) + "\n"


def test_every_file_whose_name_ends_in_txt_is_a_book_and_no_other(books):
    for name in ("1-a.txt", "B.TXT", "2-half.txt.part", "notes.md"):
        (books / name).write_text(name)
    assert joined_text(books) == "B.TXT\n\n1-a.txt\n"


def test_a_book_is_never_the_output(books):
    (books / "1-a.txt").write_text("a")
    (books / "my own.txt").write_text("b")
    assert "would replace one of the books" in join(books, output="my books/my own.txt", status=1)
    assert (books / "my own.txt").read_text() == "b"


def test_any_text_is_joined_as_python_joins_it(books):
    generator = random.Random(0)
    pieces = [*"aé“三🚀 \t\\&/\n\ufeff", "\r\n", "\ra"]
    expected = []
    for number in range(10, 30):
        characters = generator.choices(pieces, k=200)
        text = "\ufeff" + "".join(characters) + "."
        (books / f"{number}-x.txt").write_bytes(text.encode("utf-8"))
        expected.append(text.replace("\ufeff", "").replace("\r\n", "\n").replace("\r", "\n") + "\n")
    assert joined_text(books) == "\n".join(expected)


def test_a_text_in_another_encoding_stops_it_and_the_printed_command_converts_the_text(books):
    (books / "1-a.txt").write_text("good")
    (books / "my own.txt").write_bytes("Une fusée.\n".encode("latin-1"))
    message = join(books, status=1)
    assert "my books/my own.txt is not UTF-8" in message
    assert [path.name for path in books.parent.iterdir()] == ["my books"]

    command = re.search(r"iconv .*\.utf8", message)[0].replace("ENCODING", "LATIN1")
    subprocess.run(["bash", "-c", command], cwd=books.parent, check=True)
    assert (books / "my own.txt.utf8").read_text(encoding="utf-8") == "Une fusée.\n"


def test_without_books_it_says_what_to_run_and_that_training_works_anyway(books):
    message = join(books, status=1)
    assert "run python bin/download.py first" in message
    assert "python train.py works without them" in message


def test_a_folder_is_not_an_output(books):
    (books / "1-a.txt").write_text("a")
    assert "my books is a folder" in join(books, output="my books", status=1)


def test_a_failure_keeps_the_old_output(books):
    (books / "1-a.txt").write_text("a" * 100_000)
    (books.parent / "all.text").write_text("old")
    # The limit on the size of a file fails like a full disk.
    command = 'trap "" XFSZ; ulimit -f 1; exec bash "$0" "my books" all.text'
    result = subprocess.run(["bash", "-c", command, SCRIPT], cwd=books.parent, capture_output=True)
    assert result.returncode != 0
    assert (books.parent / "all.text").read_text() == "old"
    assert sorted(path.name for path in books.parent.iterdir()) == ["all.text", "my books"]


def test_by_default_it_joins_the_books_of_the_project_from_any_working_directory(tmp_path):
    project = tmp_path / "a project"
    for folder in ("bin", "data/books", "elsewhere"):
        (project / folder).mkdir(parents=True)
    script = project / "bin/concatenate.sh"
    script.write_bytes(SCRIPT.read_bytes())
    (project / "data/books/1-a.txt").write_text("a")

    command = ["bash", script]
    result = subprocess.run(command, cwd=project / "elsewhere", capture_output=True, text=True)
    assert (project / "data/scifi.txt").read_text() == "a\n"
    next_command = rf"next: python train.py --data {tmp_path}/a\ project/data/scifi.txt"
    assert result.stderr.splitlines()[1] == next_command
