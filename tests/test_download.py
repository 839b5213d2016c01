"""bin/download.py against a local server, in the process of the tests, without pauses."""

import io
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, posix_only

sys.path.insert(0, str(ROOT / "bin"))
import download as script

START = "*** START OF THE PROJECT GUTENBERG EBOOK THE SHIP ***"
END = "*** END OF THE PROJECT GUTENBERG EBOOK THE SHIP ***"
STORY = "  It was late.\n\nThe ship came down.\n" + "Nobody saw it.\n" * 500
MANY = range(900001, 900021)  # numbers of books that the catalogue lacks


def make_file(story=STORY, start=START, end=END):
    """Make a file as Project Gutenberg serves it."""
    text = f"Title: The Ship\n\n{start}\n\n\n{story}\n\n\n{end}\n\n*** START: FULL LICENSE ***\n"
    return text.encode("utf-8")


# ---- A server


class Handler(BaseHTTPRequestHandler):
    """Answers with what `server.books` has for a number: a file, or a function that answers."""

    def do_GET(self):
        number = int(re.fullmatch(r"/cache/epub/([0-9]+)/pg\1\.txt", self.path)[1])
        self.server.requests.append(number)
        answer = self.server.books.get(number, not_found)
        if callable(answer):
            answer(self)
        else:
            self.send(answer, len(answer))

    def send(self, data, length):
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        """Say nothing about requests."""


def not_found(handler):
    handler.send_error(404)


def cut_short(handler):
    handler.send(make_file(), length=10**6)


def say_nothing(handler):
    handler.server.is_closing.wait()


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.books = {}
        server.requests = []
        server.is_closing = threading.Event()
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.is_closing.set()
        server.shutdown()
        thread.join()


# ---- The script


@pytest.fixture
def pauses(monkeypatch):
    """The seconds for which the script would have slept."""
    pauses = []
    monkeypatch.setattr("time.sleep", pauses.append)
    return pauses


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "my books"


@pytest.fixture
def run(server, folder, pauses, monkeypatch, capsys):
    """A function that runs the script with arguments, and returns its error and its output."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def run(*args):
        flags = ["--mirror", server.url, "--output", folder]
        monkeypatch.setattr(sys, "argv", ["download.py", *map(str, flags + list(args))])
        error = None
        try:
            script.main()
        except SystemExit as end:
            error = end.code  # Python prints it, and ends with status 1
        captured = capsys.readouterr()
        return SimpleNamespace(error=error, stdout=captured.out, lines=captured.err.splitlines())

    return run


@pytest.fixture
def saved(run, server, folder):
    """A function that downloads one file, and returns the text that is saved."""

    def saved(content):
        server.books = {900001: content}
        assert run(900001).error is None
        return (folder / "900001.txt").read_bytes().decode("utf-8")

    return saved


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- Which books


@pytest.mark.parametrize("flags", [(), ("--all",)])
def test_by_default_the_core_is_downloaded_and_with_all_the_whole_catalogue(
    run, server, folder, flags
):
    catalogue = script.read_catalogue()
    wanted = [number for number in catalogue if flags or catalogue[number]["core"] == "1"]
    folder.mkdir()
    for number in wanted[:-3]:
        (folder / script.file_name(number, catalogue[number]["title"])).touch()
    server.books = dict.fromkeys(wanted, make_file())
    assert run(*flags).error is None
    assert server.requests == wanted[-3:]


def test_numbers_are_downloaded_whether_the_catalogue_has_them_or_not(run, server, folder):
    server.books = dict.fromkeys([35, 10542, 900001], make_file())
    assert run(*server.books).error is None
    long_name = "10542-the-boats-of-the-glen-carrig-being-an-account-of-their.txt"
    assert names(folder) == [long_name, "35-the-time-machine.txt", "900001.txt"]


def test_after_a_failure_the_same_command_downloads_only_what_is_missing(run, server):
    server.books = {900001: make_file()}
    assert run(900001, 900002).error.startswith("error: 1 of 2 book(s) failed")
    server.books[900002] = make_file()
    server.requests.clear()
    assert run(900001, 900002).error is None
    assert server.requests == [900002]


# ---- The server


def test_it_waits_two_seconds_before_each_request(run, server, pauses):
    server.books = {900001: make_file(), 900003: make_file()}
    run(*MANY[:3])
    assert pauses == [2, 2, 2]
    assert server.requests == [900001, 900002, 900003]


BAD_ANSWERS = [
    (not_found, "404 Client Error: Not Found"),
    (cut_short, "IncompleteRead"),
    (make_file(start=""), "not a book, or cut short"),
    (make_file(end=""), "not a book, or cut short"),
    (make_file() + b"\xff\x81", "can't decode byte 0x81"),
]


@pytest.mark.parametrize(("answer", "reason"), BAD_ANSWERS, ids=[pair[1] for pair in BAD_ANSWERS])
def test_a_book_that_fails_gets_one_line_and_the_others_are_saved(
    run, server, folder, answer, reason
):
    server.books = {900001: make_file(), 900002: answer, 900003: make_file()}
    first, failure, last = run(*server.books).lines
    assert first == "1 of 3: 900001.txt"
    assert re.match(f"900002: .*{reason}", failure)
    assert last == "3 of 3: 900003.txt"
    assert names(folder) == ["900001.txt", "900003.txt"]


def test_a_silent_server_is_not_waited_for_without_end(run, server, monkeypatch):
    monkeypatch.setattr(script, "TIMEOUT", 0.1)
    server.books = {900001: say_nothing}
    assert "timed out" in run(900001).lines[0]


def test_after_five_failures_in_a_row_it_gives_up_and_says_what_to_do(run, server):
    result = run(*MANY)
    assert server.requests == list(MANY[:5])
    assert len(result.lines) == 5
    assert result.error.startswith("error: gave up after 5 failures in a row")
    assert "--mirror: https://gutenberg.pglaf.org or https://aleph.pglaf.org" in result.error
    assert "python train.py uses data/sample.txt" in result.error


def test_it_goes_on_while_some_books_arrive(run, server):
    server.books = dict.fromkeys(MANY[::5], make_file())
    assert run(*MANY).error.startswith("error: 16 of 20 book(s) failed")
    assert server.requests == list(MANY)


# ---- The text of a book

START_MARKERS = [
    "***START OF THIS PROJECT GUTENBERG EBOOK THE SHIP***",
    "*** START OF THE PROJECT GUTENBERG EBOOK A LONG\nTITLE IN TWO LINES ***",
    f"{START}\n\n*** START OF THIS PROJECT GUTENBERG EBOOK THE OLD SHIP ***",
]


@pytest.mark.parametrize("start", START_MARKERS)
def test_only_what_stands_between_the_markers_is_saved(saved, start):
    assert saved(make_file(start=start)) == STORY


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252"])
def test_text_in_utf_8_or_windows_1252_is_saved_in_utf_8(saved, encoding):
    story = "“Ça ira”, dit-elle. C\u2019est l\u2019Ångström."
    data = make_file(story).decode("utf-8").encode(encoding)
    assert saved(data) == story + "\n"


def test_line_ends_become_line_feeds(saved):
    assert saved(make_file("a\r\nb\rc\n\r\n\nd")) == "a\nb\nc\n\n\nd\n"


SOURCE = "This etext was produced from Galaxy, May 1953.\nThe copyright was not renewed."
CREDITS = [
    "Produced by Greg Weeks and the Online Distributed\nProofreading Team at pgdp.net",
    "E-text prepared by Judy Boss, Omaha, NE",
    "This Project Gutenberg Etext was prepared by Barry Haworth.",
    f"Produced by Andrew Sly\n\n\n{SOURCE}",
]
NOTES = [
    f"[Transcriber's Note:\n\n    {SOURCE}\n\n    Curly brackets stand for indices.]",
    f"Transcriber\u2019s Note:\n\n    {SOURCE}",
    f"+------+\n| TRANSCRIBER'S NOTES |\n|   |\n| {SOURCE} |\n+------+",
]
LONG_NOTE = "Transcriber's note: I have made changes:\n\n  sinster    sinister\n\nNames were kept."
FOOTERS = [
    "End of the Project Gutenberg EBook of The Ship,\nby Nobody",
    "End of Project Gutenberg\u2019s The Ship, by Nobody",
    "***The End of Project Gutenberg Etext of The Ship***",
]


@pytest.mark.parametrize("credits", CREDITS)
def test_credits_at_the_beginning_are_removed(saved, credits):
    assert saved(make_file(f"{credits}\n\n\n{STORY}")) == STORY


@pytest.mark.parametrize("note", NOTES)
def test_a_note_of_the_transcriber_is_removed_wherever_it_stands(saved, note):
    assert saved(make_file(f"{STORY}\n{note}\n\n{STORY}")) == f"{STORY}\n{STORY}"


@pytest.mark.parametrize("footer", FOOTERS)
def test_a_footer_at_the_end_is_removed(saved, footer):
    assert saved(make_file(f"{STORY}\n\n{footer}")) == STORY


def test_a_long_note_and_a_footer_at_the_end_are_removed(saved):
    assert saved(make_file(f"{STORY}\n\n{LONG_NOTE}\n\n\n{FOOTERS[0]}")) == STORY


PROSE = [
    "This was produced by hand.",
    "Nobody saw the End of Project Gutenberg.",
    "The transcriber's notes lay on the table:\nTranscriber's Note, by Nobody.",
    "[Transcriber's Note: the page is burnt.] It was a dark night.",
]


@pytest.mark.parametrize("prose", PROSE)
def test_prose_that_resembles_what_volunteers_write_stays(saved, prose):
    story = f"{prose}\n\n{STORY}\n{prose}\n"
    assert saved(make_file(story)) == story


def test_credits_and_footers_in_the_middle_of_a_book_stay(saved):
    story = "\n\n".join([STORY, *CREDITS, *FOOTERS, STORY])
    assert saved(make_file(story)) == story


# ---- Files and messages


def test_a_book_gets_its_name_only_when_it_is_complete(run, server, folder, monkeypatch):
    def fail(*args):
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "replace", fail)
    server.books = {900001: make_file()}
    assert run(900001).error == "error: the disk is full"
    assert names(folder) == ["900001.txt.part"]


def test_ctrl_c_is_answered_by_one_line(run, monkeypatch):
    def press_ctrl_c(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", press_ctrl_c)
    result = run(900001)
    assert result.error == "stopped; run the same command again to download the rest"
    assert result.lines == []


def test_at_the_end_it_says_what_comes_next(run, server, folder):
    server.books = {900001: make_file()}
    *_, count, next_command = run(900001).lines
    assert count == f"1 book(s) downloaded to {folder}"
    assert next_command == f"next: bash bin/concatenate.sh '{folder}'"


# ---- The list


def test_the_list_shows_the_books_with_the_word_in_title_or_author(run):
    expected = []
    for number, row in script.read_catalogue().items():
        if "wells" in row["title"].lower() or "wells" in row["author"].lower():
            expected.append((number, row["core"] == "1"))
    lines = run("--list", "WELLS").stdout.splitlines()
    assert [(int(line.split()[0]), line.endswith("  core")) for line in lines] == expected


@posix_only
def test_a_reader_of_the_list_that_leaves_ends_it_quietly():
    command = [sys.executable, str(ROOT / "bin/download.py"), "--list"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""


def test_the_list_works_in_a_notebook(run, monkeypatch):
    notebook = io.StringIO()  # no file of the system, as in Jupyter
    monkeypatch.setattr(sys, "stdout", notebook)
    assert run("--list").error is None
    assert "The Time Machine" in notebook.getvalue()
