"""bin/download.py against a local server, in the process of the tests, without pauses."""

import csv
import importlib.util
import io
import os
import re
import socket
import subprocess
import sys
import threading
import unicodedata
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "bin/download.py"
START = "*** START OF THE PROJECT GUTENBERG EBOOK THE SHIP ***"
END = "*** END OF THE PROJECT GUTENBERG EBOOK THE SHIP ***"
STORY = "It was late.\n\n  The ship came down.\n" + "Nobody saw it.\n" * 500
MANY = range(900001, 900021)  # numbers of books that the catalogue lacks


def make_file(story=STORY, title="The Ship", start=START, end=END):
    """Make the text of a file as Project Gutenberg serves it."""
    header = f"The Project Gutenberg EBook\n\nTitle: {title}\n\n"
    return f"{header}{start}\n\n\n{story}\n\n\n{end}\n\n*** START: FULL LICENSE ***\nlicence\n"


# ---- A server


class Handler(BaseHTTPRequestHandler):
    """Answers for a book what `server.books` says: a text, bytes, or a function of the handler."""

    def do_GET(self):
        number = int(re.fullmatch(r"/cache/epub/([0-9]+)/pg\1\.txt", self.path)[1])
        self.server.requests.append(number)
        self.server.user_agents.add(self.headers["User-Agent"])
        answer = self.server.books.get(number, with_status(404))
        if callable(answer):
            answer(self)
        else:
            self.send(answer)

    def send(self, content, status=200, length=None, headers=()):
        data = content if isinstance(content, bytes) else content.encode("utf-8")
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        """Say nothing about requests."""


def with_status(status, *headers):
    return lambda handler: handler.send("", status, headers=headers)


def cut_short(handler):
    handler.send(make_file(), length=10**6)


def say_nothing(handler):
    handler.server.is_closing.wait()


def fail_first(failure, times):
    """Fail so many times, and then answer with a book."""
    failures = [failure] * times

    def answer(handler):
        if failures:
            failures.pop()(handler)
        else:
            handler.send(make_file())

    return answer


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.books = {}
        server.requests = []
        server.user_agents = set()
        server.is_closing = threading.Event()
        server.handle_error = lambda *args: None  # a client that has left is no error
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.is_closing.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def closed_address():
    """The address of a port that is taken, and at which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


# ---- The script


@pytest.fixture
def pauses(monkeypatch):
    """The seconds for which the script, or urllib3 for it, would have slept."""
    pauses = []
    monkeypatch.setattr("time.sleep", pauses.append)
    return pauses


@pytest.fixture
def script(monkeypatch, pauses):
    """The script as a module, without the proxies and certificates of this machine."""
    for name in list(os.environ):
        if name.lower().endswith(("_proxy", "_ca_bundle")):
            monkeypatch.delenv(name)

    spec = importlib.util.spec_from_file_location("download", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(script, monkeypatch, capsys):
    """A function that runs the script with arguments, and returns its status and its output."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["download.py", *map(str, args)])
        error = ""
        status = 0
        try:
            script.main()
        except SystemExit as end:
            status = end.code
        if isinstance(status, str):  # Python prints it, and ends with status 1
            error = status
            status = 1
        captured = capsys.readouterr()
        return SimpleNamespace(
            status=status, error=error, stdout=captured.out, lines=captured.err.splitlines()
        )

    return run


@pytest.fixture
def download(run, server, tmp_path):
    """A function that downloads books from the server into a folder of its own."""
    return lambda *args: run("--mirror", server.url, "--output", tmp_path / "books", *args)


@pytest.fixture
def names(tmp_path):
    """A function that returns the names of the files that were downloaded."""
    folder = tmp_path / "books"
    return lambda: sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.fixture
def saved(download, server, tmp_path):
    """A function that downloads one file, and returns the text that is saved."""

    def saved(content):
        server.books = {900001: content}
        assert download(900001).status == 0
        (path,) = (tmp_path / "books").iterdir()
        return path.read_bytes().decode("utf-8")

    return saved


def read_catalogue():
    with open(ROOT / "data/catalogue.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# ---- Which books


@pytest.mark.parametrize("flags", [(), ("--all",)])
def test_by_default_the_core_is_downloaded_and_with_all_the_whole_catalogue(
    download, server, tmp_path, flags
):
    wanted = [int(row["id"]) for row in read_catalogue() if flags or row["core"] == "1"]
    (tmp_path / "books").mkdir()
    for number in wanted[:-3]:
        (tmp_path / f"books/{number}-here.txt").touch()
    server.books = dict.fromkeys(wanted, make_file())
    assert download(*flags).status == 0
    assert server.requests == wanted[-3:]


def test_numbers_are_downloaded_whether_the_catalogue_has_them_or_not(download, server, names):
    server.books = {35: make_file(title="Other"), 900001: make_file(title="Ünïcödé—Day")}
    assert download(35, 900001).status == 0
    assert names() == ["35-the-time-machine.txt", "900001-unicode-day.txt"]


def test_after_a_failure_the_same_command_downloads_only_what_is_missing(download, server):
    server.books = {900001: make_file()}
    assert download(900001, 900002).status == 1
    server.books[900002] = make_file()
    server.requests.clear()
    assert download(900001, 900002).status == 0
    assert server.requests == [900002]


def test_the_name_of_a_file_is_safe_whatever_the_title_says(download, server, names):
    titles = ["../../x", "a\\b:c*?\x1b[31m", "🚀", "", "x" * 500]
    server.books = {900001 + index: make_file(title=title) for index, title in enumerate(titles)}
    assert download(*server.books).status == 0
    for number, name in zip(server.books, names(), strict=True):
        assert re.fullmatch(rf"{number}-[a-z0-9]+(-[a-z0-9]+)*\.txt", name)
        assert len(name) < 80


# ---- The server and the way to it


def test_it_uses_a_mirror_for_programs_and_says_who_it_is(download, server, script):
    server.books = {900001: make_file()}
    download(900001)
    assert script.MIRROR == "https://gutenberg.pglaf.org"
    assert [agent.split()[0] for agent in server.user_agents] == ["scifi-gpt-download"]


def test_it_waits_two_seconds_between_two_books(download, server, pauses):
    server.books = dict.fromkeys(MANY[:3], make_file())
    download(*MANY[:3])
    assert pauses == [2, 2]


def test_a_failure_of_the_server_that_may_pass_is_tried_again(download, server, names):
    server.books = {900001: fail_first(with_status(503), 2)}
    assert download(900001).status == 0
    assert server.requests == [900001] * 3
    assert names() == ["900001-the-ship.txt"]


def test_the_server_may_say_how_long_to_wait(download, server, pauses):
    server.books = {900001: fail_first(with_status(429, ("Retry-After", "7")), 1)}
    assert download(900001).status == 0
    assert pauses == [7]


BAD_ANSWERS = {
    "a status": (with_status(404), "HTTPError: 404 Client Error: Not Found"),
    "a status that does not pass": (with_status(503), "HTTPError: 503 Server Error: "),
    "a body cut short": (cut_short, "IncompleteRead"),
    "no start marker": (make_file(start=""), "not a book, or cut short"),
    "no end marker": (make_file(end=""), "not a book, or cut short"),
    "no known encoding": (make_file().encode() + b"\xff\x81", "neither UTF-8 nor Windows-1252"),
}


@pytest.mark.parametrize(("answer", "reason"), BAD_ANSWERS.values(), ids=BAD_ANSWERS.keys())
def test_a_book_that_fails_gets_one_line_and_the_others_are_saved(
    download, server, names, answer, reason
):
    server.books = {900001: make_file(), 900002: answer, 900003: make_file()}
    result = download(*server.books)
    assert result.status == 1
    assert result.error.startswith("error: 1 of 3 books failed")
    assert result.lines[0] == "1 of 3: 900001-the-ship.txt"
    assert re.match(f"900002: .*{reason}", result.lines[1])
    assert result.lines[2] == "3 of 3: 900003-the-ship.txt"
    assert names() == ["900001-the-ship.txt", "900003-the-ship.txt"]


def test_a_silent_server_is_not_waited_for_without_end(download, server, script, monkeypatch):
    monkeypatch.setattr(script, "TIMEOUT", 0.1)
    server.books = {900001: say_nothing}
    assert "timed out" in download(900001).lines[0]


def test_after_five_failures_in_a_row_it_gives_up_and_says_what_to_do(
    run, closed_address, tmp_path, pauses
):
    result = run("--mirror", closed_address, "--output", tmp_path, *MANY)
    assert result.status == 1
    assert len(result.lines) == 5
    assert pauses == [2, 2, 2, 2]  # none of the five was tried twice
    assert "ConnectionError" in result.error
    assert "refused" in result.error
    assert "Max retries" not in result.error  # what urllib3 wraps around the reason
    assert "--mirror: https://gutenberg.pglaf.org or https://aleph.pglaf.org" in result.error
    assert "python train.py uses data/sample.txt" in result.error


def test_it_goes_on_while_some_books_arrive(download, server):
    server.books = dict.fromkeys(MANY[::5], make_file())
    assert download(*MANY).error.startswith("error: 16 of 20 books failed")
    assert server.requests == list(MANY)


def test_an_unreachable_proxy_is_named(download, closed_address, monkeypatch):
    monkeypatch.setenv("http_proxy", closed_address)
    assert download(900001).lines[0].startswith("900001: ProxyError")


BAD_ADDRESSES = {
    "a mirror without a scheme": ("--mirror=gutenberg.example", "", "No scheme supplied"),
    "a mirror with another scheme": ("--mirror=ftp://127.0.0.1", "", "ftp://127.0.0.1"),
    "a mirror that is no address": ("--mirror=http://[half", "", "[half"),
    "a proxy without a host": ("--all", "http://", "check proxy URL"),
    "a proxy of SOCKS": ("--all", "socks5://127.0.0.1:1", "SOCKS"),
}


@pytest.mark.parametrize(
    ("flag", "proxy", "cause"), BAD_ADDRESSES.values(), ids=BAD_ADDRESSES.keys()
)
def test_an_address_that_cannot_be_used_ends_the_run_at_once_in_one_line(
    download, server, monkeypatch, flag, proxy, cause
):
    if "SOCKS" in cause and importlib.util.find_spec("socks"):
        pytest.skip("this Python has SOCKS")
    monkeypatch.setenv("http_proxy", proxy)
    result = download(flag)
    assert result.status == 1
    assert result.lines == []
    assert cause in result.error
    assert "--mirror, HTTPS_PROXY, HTTP_PROXY and ALL_PROXY" in result.error
    assert server.requests == []


# ---- The text of a book

START_MARKERS = [
    START,
    "***START OF THIS PROJECT GUTENBERG EBOOK THE SHIP***",
    "*** START OF THE PROJECT GUTENBERG EBOOK A LONG\nTITLE IN TWO LINES ***",
    f"{START}\n\n*** START OF THIS PROJECT GUTENBERG EBOOK THE OLD SHIP ***",
]


@pytest.mark.parametrize("start", START_MARKERS)
def test_only_what_stands_between_the_markers_is_saved(saved, start):
    assert saved(make_file(start=start)) == STORY


def test_the_first_line_keeps_its_indentation(saved):
    assert saved(make_file("     The Ship\n\nIt came.")) == "     The Ship\n\nIt came.\n"


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252"])
def test_text_in_utf_8_or_windows_1252_is_saved_in_utf_8(saved, encoding):
    story = "“Ça ira”, dit-elle. C\u2019est l\u2019Ångström."
    assert saved(make_file(story).encode(encoding)) == story + "\n"


def test_line_ends_become_line_feeds(saved):
    assert saved(make_file("a\r\nb\rc\r\r\nd\n\ne")) == "a\nb\nc\nd\n\ne\n"


def test_letters_are_composed_and_byte_order_marks_removed(saved):
    assert saved(make_file("\ufeff" + unicodedata.normalize("NFD", "Élan, 각"))) == "Élan, 각\n"


SOURCE = (
    "This etext was produced from Galaxy. Extensive research did not uncover any evidence that\n"
    "the U.S. copyright on this publication was renewed."
)
CREDITS = [
    "Produced by Andrew Sly",
    "Produced by Dagny, John Bickers and David Widger.",
    "Produced by Greg Weeks, adhere and the Online Distributed\nProofreading Team at pgdp.net",
    "Produced by Judith Boss.  HTML version by Al Haines.",
    "E-text prepared by Judy Boss, Omaha, NE",
    "This Project Gutenberg Etext was prepared by Barry Haworth.",
    "This eBook was produced by Andrew Sly",
]
NOTES = [
    f"[Transcriber's Note: {SOURCE}]",
    f"[Transcriber's Note:\n\n    {SOURCE}\n\n    Curly brackets stand for indices.]",
    f"Transcriber\u2019s Note:\n\n    {SOURCE}",
    f"+------+\n| TRANSCRIBER'S NOTES |\n|   |\n| {SOURCE} |\n+------+",
]
LONG_NOTE = (
    "Transcriber's note: I have made the following changes to the text:\n\n"
    "  PAGE  ORIGINAL   CHANGED TO\n    3   sinster    sinister\n\n"
    "The spelling of names was kept.\n"
)
FOOTERS = [
    "End of the Project Gutenberg EBook of The Ship,\nby Nobody",
    "End of Project Gutenberg\u2019s The Ship, by Nobody",
    "The End of Project Gutenberg Etext of The Ship",
]


@pytest.mark.parametrize("credits", CREDITS)
def test_credits_at_the_beginning_are_removed(script, credits):
    assert script.remove_notes(f"\n\n{credits}\n\n\n{STORY}") == STORY


@pytest.mark.parametrize("note", NOTES)
def test_a_note_of_the_transcriber_near_the_beginning_or_the_end_is_removed(script, note):
    title = "THE SHIP\n\nby Nobody\n\n"
    assert script.remove_notes(f"{title}{note}\n\n{STORY}") == title + STORY
    assert script.remove_notes(f"{STORY}\n{note}\n") == STORY


@pytest.mark.parametrize("footer", FOOTERS)
def test_a_footer_at_the_end_is_removed(script, footer):
    assert script.remove_notes(f"{STORY}\n\n\n{footer}\n") == STORY


def test_credits_notes_and_a_footer_are_removed_together(saved):
    before = f"{CREDITS[2]}\n\n\n{NOTES[1]}\n\n\n"
    after = f"\n\n\n{NOTES[0]}\n\n\n{LONG_NOTE}\n\n{FOOTERS[0]}"
    assert saved(make_file(before + STORY + after)) == STORY


PROSE = [
    "Produced by the mills of Mars, the cloth was red.",
    "Nobody saw the\nEnd of Project Gutenberg.",
    "The end of Project Gutenberg, they said, was the end of reading.",
    "The transcriber's notes lay on the table, in good spelling.",
    "Transcriber's Note\n\nI found these pages in a bottle, and copied them in tears.",
    "[Transcriber's Note: the rest of the page is burnt.]",
    "[Transcriber's Note: spelling kept.] It was a dark night.",
    "Produced by hand, the letters stood in italics.",
]


@pytest.mark.parametrize("prose", PROSE)
def test_prose_that_resembles_what_volunteers_write_stays(script, prose):
    for story in (f"{prose}\n", f"{prose}\n\n{STORY}", f"{STORY}\n{prose}\n"):
        assert script.remove_notes(story) == story


def test_credits_notes_and_footers_in_the_middle_of_a_book_stay(script):
    middle = "\n\n".join([*CREDITS, *NOTES, *FOOTERS])
    story = f"{STORY}\n{middle}\n\n{STORY}"
    assert script.remove_notes(story) == story


# ---- Files and messages


@pytest.mark.parametrize("failure", [OSError("the disk is full"), KeyboardInterrupt()])
def test_a_book_gets_its_name_only_when_it_is_complete(
    download, server, names, monkeypatch, failure
):
    def fail(*args):
        raise failure

    monkeypatch.setattr(os, "replace", fail)
    server.books = {900001: make_file()}
    assert download(900001).status != 0
    assert names() == ["900001-the-ship.part"]


def test_ctrl_c_is_answered_by_one_line_and_the_next_run_goes_on(
    download, server, names, monkeypatch
):
    def press_ctrl_c(seconds):
        raise KeyboardInterrupt

    server.books = dict.fromkeys(MANY[:2], make_file())
    with monkeypatch.context() as patch:
        patch.setattr("time.sleep", press_ctrl_c)
        result = download(*MANY[:2])
    assert result.status == 130
    assert result.lines[1:] == ["stopped; run the same command again to download the rest"]
    assert names() == ["900001-the-ship.txt"]

    assert download(*MANY[:2]).status == 0
    assert server.requests == list(MANY[:2])


def test_a_folder_that_cannot_be_made_is_named(run, tmp_path):
    (tmp_path / "file").touch()
    result = run("--output", tmp_path / "file/books", 900001)
    assert result.status == 1
    assert result.error.startswith("error: ")
    assert str(tmp_path / "file") in result.error


def test_at_the_end_it_says_how_many_books_were_downloaded_and_what_comes_next(
    download, server, tmp_path
):
    server.books = dict.fromkeys(MANY[:2], make_file())
    *_, count, next_command = download(*MANY[:2]).lines
    assert count == f"2 books downloaded to {tmp_path / 'books'}, 0 were already there"
    assert next_command == f"next: bash bin/concatenate.sh {tmp_path / 'books'}"


def test_a_terminal_gets_a_progress_bar_instead_of_lines(download, server, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    server.books = {900001: make_file()}
    assert download(900001).status == 0
    assert "100%" in terminal.getvalue()
    assert "1 of 1" not in terminal.getvalue()


@pytest.mark.parametrize("args", [("x",), ("--what",)])
def test_a_wrong_argument_ends_with_status_2(run, args):
    result = run(*args)
    assert result.status == 2
    assert "error: " in result.lines[-1]


# ---- The list


@pytest.mark.parametrize("word", ["", "WELLS"])
def test_the_list_shows_the_books_with_the_word_in_title_or_author(run, word):
    expected = []
    for row in read_catalogue():
        if word.lower() in f"{row['title']} {row['author']}".lower():
            expected.append((row["id"], row["core"] == "1"))
    _, *lines = run("--list", word).stdout.splitlines()
    assert [(line.split()[0], line.endswith("  core")) for line in lines] == expected


def test_the_list_works_in_a_notebook_and_through_a_pipe_of_another_encoding(run, monkeypatch):
    notebook = io.StringIO()  # which has no reconfigure
    monkeypatch.setattr(sys, "stdout", notebook)
    assert run("--list").status == 0

    pipe = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", pipe)
    assert run("--list").status == 0
    pipe.flush()
    assert pipe.buffer.getvalue().decode("utf-8").split() == notebook.getvalue().split()


def test_the_list_ends_without_a_traceback_when_its_reader_leaves():
    words = [sys.executable, SCRIPT, "--list"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
