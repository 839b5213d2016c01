"""bin/download.py, run as a user runs it, against a server that misbehaves on purpose."""

import csv
import fcntl
import importlib.util
import os
import pty
import random
import re
import resource
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import termios
import threading
import time
import unicodedata
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "bin/download.py"
STORY = "It was late.\n\n  The ship came down.\n" + "Nobody saw it. " * 200
CLEAN_STORY = STORY.rstrip() + "\n"
START = "*** START OF THE PROJECT GUTENBERG EBOOK THE SHIP ***"
END = "*** END OF THE PROJECT GUTENBERG EBOOK THE SHIP ***"
PATIENT = 20  # seconds; a busy machine may make a good server slow
IMPATIENT = 0.5
HTML_PAGE = "<!DOCTYPE html>\n<html><body>Are you a human?</body></html>\n"


def make_file(story=STORY, title="The Ship", start=START, end=END, encoding="UTF-8"):
    """Make the text of a file as Project Gutenberg serves it."""
    header = (
        f"The Project Gutenberg EBook\n\nTitle: {title}\n\nCharacter set encoding: {encoding}\n"
    )
    licence = "*** START: FULL LICENSE ***\nlicence\n"
    return f"{header}\n{start}\n\n\n{story}\n\n\n{end}\n\n{licence}"


# ---------------------------------------------------------------------------------------
# A server, and the ways in which it answers
# ---------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Answers for a book what `books` says by number: text, bytes, or a function of the handler.

    It answers 404 for the others. `requests` lists the books that it was asked for.
    """

    daemon_threads = True
    scheme = "http"

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.books = {}
        self.requests = []
        self.user_agents = set()
        self.is_closing = threading.Event()

    def handle_error(self, request, client_address):
        """Say nothing about clients that left."""

    @property
    def url(self):
        return f"{self.scheme}://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        number = int(re.fullmatch(r"/cache/epub/([0-9]+)/pg\1\.txt", self.path)[1])
        self.server.requests.append(number)
        self.server.user_agents.add(self.headers["User-Agent"])
        answer = self.server.books.get(number, answer_status(404))
        if callable(answer):
            answer(self)
        else:
            self.send(answer)

    def send(self, body, status=200, length=None, headers=()):
        data = body.encode("utf-8") if isinstance(body, str) else body
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        """Say nothing about requests."""


def answer_status(status, headers=()):
    return lambda handler: handler.send("", status, headers=headers)


def redirect_to(address):
    return answer_status(302, headers=[("Location", address)])


def redirect_to_itself(handler):
    handler.send("", 302, headers=[("Location", handler.path)])


def send_too_little(handler):
    handler.send(make_file(), length=10**6)
    handler.close_connection = True


def reset_connection(handler):
    handler.send(make_file()[:500], length=10**6)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.close_connection = True


def fall_silent(handler):
    handler.send(make_file()[:500], length=10**6)
    handler.server.is_closing.wait(30)


def send_forever(piece, pause):
    def answer(handler):
        handler.send("", length=10**9)
        with suppress(OSError):
            while not handler.server.is_closing.wait(pause):
                handler.wfile.write(piece)

    return answer


def send_broken_gzip(handler):
    handler.send(b"not gzip at all", headers=[("Content-Encoding", "gzip")])


def speak_no_http(handler):
    handler.wfile.write(b"\x00\xff nonsense\r\n\r\n")
    handler.close_connection = True


def fail_first(failure, times):
    """Answer with a failure so many times, and then with the book."""
    failures_left = [failure] * times

    def answer(handler):
        if failures_left:
            failures_left.pop()(handler)
        else:
            handler.send(make_file())

    return answer


@contextmanager
def serving(server):
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.is_closing.set()
            server.shutdown()
            thread.join()


@pytest.fixture
def server():
    with serving(Server()) as server:
        yield server


def closed_address():
    """Return the address of a port at which nobody listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


# ---------------------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------------------


def make_command(mirror, folder, *args, timeout=PATIENT):
    flags = ["--mirror", mirror, "--output", folder, "--pause", 0, "--timeout", timeout]
    return [sys.executable, str(SCRIPT), *map(str, args), *map(str, flags)]


def make_environment(**variables):
    ours = {"REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"}
    environment = {}
    for name, value in os.environ.items():
        if not name.lower().endswith("_proxy") and name not in ours:
            environment[name] = value
    return environment | variables


def download(mirror, folder, *args, timeout=PATIENT, limit=None, **variables):
    """Run the script to its end, with variables in its environment."""
    return subprocess.run(
        make_command(mirror, folder, *args, timeout=timeout),
        capture_output=True,
        text=True,
        timeout=60,
        env=make_environment(**variables),
        preexec_fn=limit,
    )


def start_download(mirror, folder, *args, timeout=PATIENT):
    return subprocess.Popen(
        make_command(mirror, folder, *args, timeout=timeout),
        stderr=subprocess.PIPE,
        text=True,
        env=make_environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def names_in(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def read_only_book(folder):
    (path,) = folder.iterdir()
    return path.read_bytes().decode("utf-8")


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def line_about(number, result):
    """Return the one line in which the script explains why a book failed."""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith(f"{number}: ")]
    return line


def error_of(result, status):
    """Return the error message of a run that must fail with this status and no traceback."""
    assert result.returncode == status
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if "error: " in line]
    return line


def saved_story(server, folder, **parts):
    """Download a file made of these parts and return the text that is saved."""
    server.books = {900001: make_file(**parts)}
    assert download(server.url, folder, 900001).returncode == 0
    return read_only_book(folder)


def read_catalogue():
    with open(ROOT / "data/catalogue.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("download", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------------------------------
# Failures of one book
# ---------------------------------------------------------------------------------------

BAD_ANSWERS = {
    "404": (answer_status(404), "404"),
    "403": (answer_status(403), "403"),
    "500 every time": (answer_status(500), "500"),
    "503 every time": (answer_status(503), "503"),
    "too little": (send_too_little, "broke"),
    "reset": (reset_connection, "broke"),
    "broken gzip": (send_broken_gzip, "broke"),
    "no http": (speak_no_http, "broke"),
    "silent": (fall_silent, "silent"),
    "a byte now and then": (send_forever(b"x", 0.1), "too slow"),
    "endless": (send_forever(b"x" * 2**18, 0), "20 MB"),
    "html": ("<!DOCTYPE html><html>" + make_file() + "</html>", "HTML"),
    "empty": ("", "empty"),
    "no start": ("Just a text.\n" * 99, "START"),
    "no end": (make_file(end=""), "END"),
    "nothing between": (make_file(story=""), "nothing"),
    "no known encoding": (make_file().encode("utf-8") + b"\xff\x81", "UTF-8"),
    "redirect loop": (redirect_to_itself, "redirects"),
    "redirect to a broken address": (redirect_to("http://[half.example/"), "redirect"),
    "redirect to another scheme": (redirect_to("ftp://half.example/"), "redirect"),
}


@pytest.mark.parametrize(("answer", "reason"), BAD_ANSWERS.values(), ids=BAD_ANSWERS.keys())
def test_a_book_that_fails_is_named_with_its_reason_and_the_others_are_saved(
    server, tmp_path, answer, reason
):
    server.books = {900001: make_file(), 900002: answer, 900003: make_file()}
    timeout = IMPATIENT if reason in ("silent", "too slow") else PATIENT
    result = download(server.url, tmp_path / "books", *server.books, timeout=timeout)
    assert error_of(result, 1).startswith("error: 1 of 3 books failed")
    assert reason in line_about(900002, result)
    assert names_in(tmp_path / "books") == ["900001-the-ship.txt", "900003-the-ship.txt"]


PASSING_FAILURES = {
    "500": (answer_status(500), 2),
    "502": (answer_status(502), 2),
    "503": (answer_status(503), 2),
    "504": (answer_status(504), 2),
    "429": (answer_status(429), 2),
    "too little": (send_too_little, 1),
    "reset": (reset_connection, 2),
    "silent": (fall_silent, 1),
}


@pytest.mark.parametrize(
    ("failure", "times"), PASSING_FAILURES.values(), ids=PASSING_FAILURES.keys()
)
def test_a_failure_that_may_pass_is_tried_again(server, tmp_path, failure, times):
    server.books = {900001: fail_first(failure, times)}
    timeout = 2 if failure == fall_silent else PATIENT
    assert download(server.url, tmp_path, 900001, timeout=timeout).returncode == 0
    assert server.requests == [900001] * (times + 1)
    assert names_in(tmp_path) == ["900001-the-ship.txt"]


def test_the_server_may_say_how_long_to_wait(server, tmp_path):
    refusal = answer_status(429, headers=[("Retry-After", "1")])
    server.books = {900001: fail_first(refusal, 1)}
    began = time.monotonic()
    assert download(server.url, tmp_path, 900001).returncode == 0
    assert time.monotonic() - began >= 1


def test_after_a_failure_only_the_missing_book_is_downloaded(server, tmp_path):
    server.books = {900001: make_file()}
    download(server.url, tmp_path, 900001, 900002)
    server.requests.clear()
    server.books[900002] = make_file()
    assert download(server.url, tmp_path, 900001, 900002).returncode == 0
    assert server.requests == [900002]


def test_books_that_are_already_there_are_not_downloaded(server, tmp_path):
    (tmp_path / "900001-here.txt").write_text("here", encoding="utf-8")
    assert download(server.url, tmp_path, 900001).returncode == 0
    assert server.requests == []


def test_it_says_who_it_is(server, tmp_path):
    server.books = {900001: make_file()}
    download(server.url, tmp_path, 900001)
    (user_agent,) = server.user_agents
    assert user_agent.startswith("scifi-gpt")


# ---------------------------------------------------------------------------------------
# Failures that concern every book
# ---------------------------------------------------------------------------------------

MANY = range(900001, 900041)
GIVES_UP = {
    "403": (answer_status(403), 3, "blocks this machine"),
    "an HTML page": (HTML_PAGE, 3, "blocks this machine"),
    "silence": (fall_silent, 3, "does not answer"),
    "503": (answer_status(503), 10, "unreliable"),
    "reset": (reset_connection, 10, "unreliable"),
    "404": (answer_status(404), 20, "check --mirror"),
}


@pytest.mark.parametrize(("answer", "books", "reason"), GIVES_UP.values(), ids=GIVES_UP.keys())
def test_it_gives_up_when_a_few_books_in_a_row_fail_because_of_the_server(
    server, tmp_path, answer, books, reason
):
    server.books = dict.fromkeys(MANY, answer)
    timeout = IMPATIENT if answer == fall_silent else PATIENT
    message = error_of(download(server.url, tmp_path, *MANY, timeout=timeout), 1)
    assert "gave up" in message
    assert reason in message
    assert f"{len(MANY) - books} were not tried" in message
    assert sorted(set(server.requests)) == list(MANY)[:books]


def test_it_does_not_give_up_while_some_books_arrive(server, tmp_path):
    server.books = dict.fromkeys(MANY, answer_status(403))
    for number in list(MANY)[::3]:
        server.books[number] = make_file()
    message = error_of(download(server.url, tmp_path, *MANY), 1)
    assert "blocks" not in message
    assert server.requests == list(MANY)


def test_it_does_not_give_up_because_of_many_bad_books(server, tmp_path):
    server.books = dict.fromkeys(MANY, "Just a text.\n")
    error_of(download(server.url, tmp_path, *MANY), 1)
    assert server.requests == list(MANY)


@pytest.mark.parametrize("ids", [(), (900001,)], ids=["the core", "one book"])
def test_without_a_connection_it_names_another_mirror_and_says_that_training_works(tmp_path, ids):
    message = error_of(download(closed_address(), tmp_path, *ids), 1)
    assert "no connection" in message
    assert re.search(r"--mirror https://\S+", message)
    assert "python train.py works without the books" in message


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate that nobody has signed, with its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate, and is missing")
    path = tmp_path_factory.mktemp("certificate") / "self-signed.pem"
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    words += ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    words += ["-keyout", path, "-out", path.with_suffix(".crt")]
    subprocess.run(words, check=True, capture_output=True)
    return path.with_suffix(".crt"), path


@pytest.fixture
def https_server(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    server = Server()
    server.scheme = "https"
    server.socket = context.wrap_socket(server.socket, server_side=True)
    with serving(server) as server:
        server.books = dict.fromkeys(MANY, make_file())
        yield server


def test_an_untrusted_certificate_is_named_and_ends_the_run(https_server, tmp_path):
    result = download(https_server.url, tmp_path, *MANY)
    assert "gave up" in error_of(result, 1)
    assert result.stderr.count("certificate is not trusted: self-signed certificate") == 3


def test_a_certificate_that_the_user_trusts_is_enough(https_server, certificate, tmp_path):
    trusted = str(certificate[0])
    result = download(https_server.url, tmp_path, 900001, REQUESTS_CA_BUNDLE=trusted)
    assert result.returncode == 0


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_a_variable_that_names_a_missing_certificate_file_is_named(tmp_path, variable):
    mirror = closed_address().replace("http:", "https:")
    result = download(mirror, tmp_path, 900001, **{variable: "/nowhere/bundle.pem"})
    error_of(result, 1)
    assert f"{variable} names /nowhere/bundle.pem" in line_about(900001, result)


def test_an_unreachable_proxy_is_named_and_ends_the_run(server, tmp_path):
    result = download(server.url, tmp_path, *MANY, http_proxy=closed_address())
    assert "the proxy does not work" in error_of(result, 1)
    assert result.stderr.count("the proxy cannot be reached") == 3


# ---------------------------------------------------------------------------------------
# The text of a book
# ---------------------------------------------------------------------------------------

START_MARKERS = [
    START,
    "*** START OF THIS PROJECT GUTENBERG EBOOK THE SHIP ***",
    "***START OF THE PROJECT GUTENBERG EBOOK THE SHIP***",
    "*** START OF THIS PROJECT GUTENBERG EBOOK A LONG\nTITLE IN TWO LINES ***",
    "*** START OF THE PROJECT GUTENBERG EBOOK A ***\n\n"
    "***START OF THIS PROJECT GUTENBERG EBOOK A***",
]


@pytest.mark.parametrize("start", START_MARKERS)
def test_only_what_stands_between_the_markers_is_saved(server, tmp_path, start):
    end = start.split("\n\n")[-1].replace("START", "END")
    assert saved_story(server, tmp_path, start=start, end=end) == CLEAN_STORY


CORRECTIONS = "I have made the following changes to the text:\n  3  14  sinster  sinister\n"
FOOTERS = [
    "End of the Project Gutenberg EBook of The Ship,\nby Nobody",
    "End of Project Gutenberg\u2019s The Ship, by Nobody",
    "End of this Project Gutenberg Etext of The Ship",
    "The End of Project Gutenberg etext of The Ship",
    "The end of the Project Gutenberg etext of The Ship",
    "End Project Gutenberg EBook of The Ship",
    "END OF PROJECT GUTENBERG ETEXT OF THE SHIP",
    f"End of Project Gutenberg's Etext of The Ship\n\n\n{CORRECTIONS}",
    f"End Project Gutenberg EBook of The Ship\n\n{CORRECTIONS}\nEnd Project Gutenberg EBook",
]
CREDITS = [
    "Produced by Judith Boss",
    "Produced by John Bean; Diane Bean and David Widger.",
    "Produced by An Anonymous Volunteer",
    "Produced by Greg Weeks, adhere and the Online Distributed\n"
    "Proofreading Team at http://www.pgdp.net",
    "Produced by Judith Boss.  HTML version by Al Haines.",
    "E-text prepared by Greg Weeks and the Project Gutenberg Online\n"
    "Distributed Proofreading Team\n\n\n"
    "Note: Project Gutenberg also has an HTML version of this file.",
    "This etext was prepared by Judy Boss, Omaha, NE",
]
RENEWED = "did not uncover any evidence that the U.S. copyright on this\npublication was renewed."
NOTES = [
    f"[Transcriber's Note: This etext was produced from Galaxy. Research {RENEWED}]",
    f"Transcriber's Note:\n\n    This etext was produced from _Galaxy_. Research {RENEWED}",
    f"Transcriber\u2019s note: Research {RENEWED}",
    f"[Transcriber's Note:\n\n  Research {RENEWED}\n\n  Curly brackets stand for indices.]",
    "+-----------------+\n| Transcriber's Note |\n|    |\n| Typos were corrected. |\n+-------+",
    "TRANSCRIBERS NOTES\n\nObvious printer's errors have been corrected.",
]
LONG_NOTES = [
    "Transcriber's Note\n\n_Italics_ are marked.\n\nSpelling was kept.\n\n"
    "Page 5: teh changed to the\n\nA typo was kept.",
    "Transcriber's note: I have made these corrections:\n\n  page 3, sinster: changed to sinister",
]


@pytest.mark.parametrize("footer", FOOTERS)
def test_the_footer_and_what_follows_it_is_removed(server, tmp_path, footer):
    assert saved_story(server, tmp_path, story=f"{STORY}\n\n\n{footer}") == CLEAN_STORY


@pytest.mark.parametrize("credits", CREDITS)
def test_the_names_of_those_who_made_the_file_are_removed_at_the_beginning(
    server, tmp_path, credits
):
    assert saved_story(server, tmp_path, story=f"{credits}\n\n\n\n{STORY}") == CLEAN_STORY


@pytest.mark.parametrize("note", NOTES)
def test_a_note_of_the_transcriber_is_removed_at_the_beginning(server, tmp_path, note):
    story = f"THE SHIP\n\nby Nobody\n\n{note}\n\n{STORY}"
    assert saved_story(server, tmp_path, story=story) == f"THE SHIP\n\nby Nobody\n\n{CLEAN_STORY}"


@pytest.mark.parametrize("note", NOTES + LONG_NOTES)
def test_a_note_of_the_transcriber_is_removed_at_the_end(server, tmp_path, note):
    assert saved_story(server, tmp_path, story=f"{STORY}\n\n\n{note}") == CLEAN_STORY


def test_credits_notes_and_a_footer_are_removed_together(server, tmp_path):
    before = f"{CREDITS[3]}\n\n\n{NOTES[1]}\n\n\n"
    after = f"\n\n\n{NOTES[0]}\n\n\n{LONG_NOTES[0]}\n\n\n{FOOTERS[7]}"
    assert saved_story(server, tmp_path, story=before + STORY + after) == CLEAN_STORY


PROSE = [
    "Produced by the mills of Mars, the cloth was red.",
    "Produced by the volunteers of Mars, the cloth was red.",
    "Produced by Judith was a pie that nobody ate.",
    "The end came at noon.",
    "End of the line, said the conductor.",
    "He had read it in Project Gutenberg, on the ship's computer.",
    "The end of Project Gutenberg, they said, was the end of reading.",
    "Nobody saw the\nEnd of Project Gutenberg.",
    "The transcriber's notes lay on the table.",
    "Transcriber's Note\n\nI found these pages in a bottle, and copied them in tears.",
    "[Transcriber's Note: the rest of the page is burnt.]",
    "Note: nobody came.",
    "Copyright, 1931, by Ray Cummings",
    "THE END",
]


@pytest.mark.parametrize("prose", PROSE)
@pytest.mark.parametrize("place", ["beginning", "end", "alone"])
def test_prose_that_resembles_what_volunteers_write_stays(script, place, prose):
    stories = {
        "beginning": f"{prose}\n\n{CLEAN_STORY}",
        "end": f"{CLEAN_STORY}\n{prose}\n",
        "alone": f"{prose}\n",
    }
    story = stories[place]
    assert script.remove_notes(f"\n\n{story}\n\n") == story


def test_notes_and_footers_in_the_middle_of_a_book_stay(script):
    half = "".join(f"It was day {day}.\n\n" for day in range(100))
    middle = "\n\n".join([NOTES[0], NOTES[1], CREDITS[3], FOOTERS[0]])
    story = f"{half}{middle}\n\n{half}".rstrip() + "\n"
    assert script.remove_notes(story) == story


def test_the_first_line_keeps_its_indentation(server, tmp_path):
    assert saved_story(server, tmp_path, story="     The Ship\n\nIt came.") == (
        "     The Ship\n\nIt came.\n"
    )


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r", "\r\r\n"])
def test_every_line_end_becomes_a_line_feed(server, tmp_path, line_end):
    server.books = {900001: "\ufeff" + make_file().replace("\n", line_end)}
    download(server.url, tmp_path, 900001)
    assert read_only_book(tmp_path) == CLEAN_STORY


def test_line_ends_may_be_mixed(server, tmp_path):
    assert saved_story(server, tmp_path, story="a\r\nb\rc\nd\r\r\ne\n\nf") == "a\nb\nc\nd\ne\n\nf\n"


WITH_QUOTES = "“Ça ira”, dit-elle. C\u2019est l\u2019Ångström."
WITHOUT_QUOTES = "Ça ira, dit-elle. Für Ångström."
GREEK = "Ἀλλὰ τί; οὐδέν"


@pytest.mark.parametrize(
    ("stated", "used", "story"),
    [
        ("UTF-8", "utf-8-sig", WITH_QUOTES),
        ("ASCII", "utf-8", WITH_QUOTES),
        ("ISO-8859-1", "utf-8", WITH_QUOTES),
        ("Windows-1252", "utf-8", GREEK),
        ("UTF-8", "cp1252", WITH_QUOTES),
        ("ASCII", "cp1252", WITH_QUOTES),
        ("ISO-8859-1", "cp1252", WITH_QUOTES),
        ("nonsense", "cp1252", WITH_QUOTES),
        ("ISO-8859-1", "latin-1", WITHOUT_QUOTES),
        ("ISO Latin-1", "latin-1", WITHOUT_QUOTES),
        ("ISO-8859-2", "iso8859-2", "Žlutý kůň"),
        ("Windows-1251", "cp1251", "Жил-был конь"),
    ],
)
def test_the_bytes_decide_about_the_encoding_before_the_header_does(
    server, tmp_path, stated, used, story
):
    server.books = {900001: make_file(story, encoding=stated).encode(used)}
    assert download(server.url, tmp_path, 900001).returncode == 0
    assert read_only_book(tmp_path) == unicodedata.normalize("NFC", story) + "\n"


def test_unicode_is_composed(server, tmp_path):
    decomposed = unicodedata.normalize("NFD", "Élan, 각")
    assert saved_story(server, tmp_path, story=decomposed) == "Élan, 각\n"


# ---------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------

HOSTILE_TITLES = ["../../x", "/etc/passwd", "🚀", "", "a\x00b\x1b[31m", "x" * 500, "CON", ". ."]
HOSTILE_TITLES += ["Ünïcödé—Day", "a\\b:c*?"]


def test_the_name_of_a_file_is_safe_whatever_the_title_says(server, tmp_path):
    server.books = {}
    for number, title in enumerate(HOSTILE_TITLES, 900001):
        server.books[number] = make_file(title=title)
    folder = tmp_path / "deep/er/books"
    assert download(server.url, folder, *server.books).returncode == 0
    for number, name in zip(server.books, names_in(folder), strict=True):
        assert re.fullmatch(rf"{number}-[a-z0-9]+(-[a-z0-9]+)*\.txt", name)
        assert len(name) < 80
    assert names_in(tmp_path) == ["deep"]


def test_in_the_name_of_a_file_accents_go_and_a_dash_separates(server, tmp_path):
    server.books = {900001: make_file(title="Ünïcödé—Day")}
    download(server.url, tmp_path, 900001)
    assert names_in(tmp_path) == ["900001-unicode-day.txt"]


def test_a_book_of_the_catalogue_is_named_by_the_catalogue(server, tmp_path):
    server.books = {35: make_file(title="Something Else")}
    download(server.url, tmp_path, 35)
    assert names_in(tmp_path) == ["35-the-time-machine.txt"]


def test_after_kill_9_every_book_with_a_name_is_complete(server, tmp_path):
    story = "The ship came down.\n" * 300_000
    server.books = dict.fromkeys(range(900001, 900031), make_file(story))
    generator = random.Random(1)
    for _ in range(5):
        before = set(names_in(tmp_path))
        process = start_download(server.url, tmp_path, *server.books)
        wait_until(lambda before=before: set(names_in(tmp_path)) - before)  # it begins to write
        time.sleep(generator.random() * 0.02)
        process.kill()
        process.communicate(timeout=20)
        for path in tmp_path.glob("*.txt"):
            assert path.read_text(encoding="utf-8") == story


@pytest.mark.parametrize(("age", "is_kept"), [(0, True), (3600, False)])
def test_what_a_killed_run_left_is_removed_but_not_what_another_run_is_writing(
    server, tmp_path, age, is_kept
):
    server.books = {900001: make_file()}
    left = tmp_path / ".900002-x.txt.77.part"
    left.write_text("half", encoding="utf-8")
    os.utime(left, (time.time() - age, time.time() - age))
    download(server.url, tmp_path, 900001)
    assert left.exists() == is_kept


def test_several_runs_at_once_do_not_disturb_each_other(server, tmp_path):
    server.books = dict.fromkeys(range(900001, 900011), make_file())
    processes = [start_download(server.url, tmp_path, *server.books) for _ in range(3)]
    for process in processes:
        process.communicate(timeout=60)
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(names_in(tmp_path)) == 10


def test_ctrl_c_ends_the_run_with_one_line_and_status_130(server, tmp_path):
    server.books = {900001: make_file(), 900002: fall_silent}
    process = start_download(server.url, tmp_path, 900001, 900002)
    wait_until(lambda: 900002 in server.requests)
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in messages
    assert messages.splitlines()[-1].startswith("stopped; run the same command again")
    assert names_in(tmp_path) == ["900001-the-ship.txt"]


def limit_file_size():
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))


def test_a_full_disk_ends_the_run_with_one_line(server, tmp_path):
    server.books = {900001: make_file(), 900002: make_file()}
    result = download(server.url, tmp_path, *server.books, limit=limit_file_size)
    assert str(tmp_path) in error_of(result, 1)
    assert server.requests == [900001]
    assert names_in(tmp_path) == []


def test_an_impossible_folder_is_named(server, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    message = error_of(download(server.url, tmp_path / "file/books", 900001), 1)
    assert str(tmp_path / "file") in message
    assert server.requests == []


def test_a_tilde_is_the_home_folder(server, tmp_path):
    server.books = {900001: make_file()}
    assert download(server.url, "~/books", 900001, HOME=str(tmp_path)).returncode == 0
    assert names_in(tmp_path / "books") == ["900001-the-ship.txt"]


# ---------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------

WRONG_ARGUMENTS = [
    ("x",),
    ("0",),
    ("1_0",),
    ("--", "-5"),
    ("--mirror", "ftp://x"),
    ("--mirror", "https://"),
    ("--mirror", "http://[half"),
    ("--output", ""),
    ("--pause", "-1"),
    ("--timeout", "nan"),
    ("--timeout", "0"),
    ("--what",),
]


@pytest.mark.parametrize("args", WRONG_ARGUMENTS)
def test_a_wrong_argument_is_an_error_with_status_2(args):
    words = [sys.executable, SCRIPT, *args]
    result = subprocess.run(words, capture_output=True, text=True, timeout=20)
    error_of(result, 2)
    assert result.stderr.startswith("usage: ")
    assert result.stderr.count("\n") == 2


def test_the_default_server_is_a_mirror_with_the_pause_that_it_asks_for(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["download.py"])
    args = script.parse_arguments()
    assert args.mirror == "https://gutenberg.pglaf.org"
    assert args.pause == 2


@pytest.mark.parametrize("flags", [(), ("--all",)])
def test_by_default_the_core_is_wanted_and_with_all_the_whole_catalogue(server, tmp_path, flags):
    wanted = [int(row["id"]) for row in read_catalogue() if flags or row["core"] == "1"]
    for number in wanted[3:]:
        (tmp_path / f"{number}-here.txt").write_text("here", encoding="utf-8")
    server.books = dict.fromkeys(wanted, make_file())
    assert download(server.url, tmp_path, *flags).returncode == 0
    assert server.requests == wanted[:3]


@pytest.mark.parametrize("content", ["id,title\n1,A\n", "id,title,author,core\nx,A,B,1\n"])
def test_a_damaged_catalogue_is_named(script, tmp_path, monkeypatch, content):
    path = tmp_path / "catalogue.csv"
    path.write_text(content, encoding="utf-8")
    monkeypatch.setattr(script, "CATALOGUE", path)
    with pytest.raises(script.DownloadError, match="is damaged"):
        script.read_catalogue()


@pytest.mark.parametrize("word", ["", "WELLS", "moon"])
def test_the_list_shows_each_book_with_the_word_in_its_title_or_author(tmp_path, word):
    (tmp_path / "35-x.txt").write_text("here", encoding="utf-8")
    result = download("http://127.0.0.1", tmp_path, f"--list={word}")
    assert result.returncode == 0
    assert result.stderr == ""
    expected = []
    for row in read_catalogue():
        if word.lower() in f"{row['title']}\n{row['author']}".lower():
            expected.append(row["id"])
    shown = result.stdout.splitlines()[1:]
    assert [line.split()[0] for line in shown] == expected
    assert max(map(len, shown)) <= 100


def test_the_list_marks_the_books_that_are_there(tmp_path):
    (tmp_path / "35-x.txt").write_text("here", encoding="utf-8")
    result = download("http://127.0.0.1", tmp_path, "--list")
    marked = [line for line in result.stdout.splitlines()[1:] if line.endswith("here")]
    assert [line.split()[0] for line in marked] == ["35"]


def test_the_list_says_nothing_when_its_reader_leaves(tmp_path):
    words = make_command("http://127.0.0.1", tmp_path, "--list")
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_list_that_cannot_be_written_is_an_error(tmp_path):
    words = make_command("http://127.0.0.1", tmp_path, "--list")
    with open("/dev/full", "wb") as full:
        result = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, timeout=20)
    assert result.returncode == 1
    assert result.stderr.startswith("error: standard output: ")
    assert result.stderr.count("\n") == 1


def test_a_list_without_standard_output_is_an_error(tmp_path):
    words = ["bash", "-c", 'exec "$@" >&-', "bash"]
    words += make_command("http://127.0.0.1", tmp_path, "--list")
    result = subprocess.run(words, capture_output=True, text=True, timeout=20)
    assert "standard output is closed" in error_of(result, 1)


# ---------------------------------------------------------------------------------------
# Progress
# ---------------------------------------------------------------------------------------


def test_a_log_file_gets_one_whole_line_for_each_book(server, tmp_path):
    server.books = {900001: make_file(), 900003: make_file()}
    result = download(server.url, tmp_path, 900001, 900002, 900003)
    assert "\r" not in result.stderr
    assert result.stderr.splitlines()[:3] == [
        "1 of 3: 900001-the-ship.txt",
        "900002: the server answers 404",
        "3 of 3: 900003-the-ship.txt",
    ]


def test_a_terminal_gets_a_progress_bar(server, tmp_path):
    server.books = {900001: make_file()}
    ours, terminal = pty.openpty()
    rows_and_columns = struct.pack("HHHH", 25, 80, 0, 0)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, rows_and_columns)
    words = make_command(server.url, tmp_path, 900001)
    subprocess.run(words, stderr=terminal, timeout=60, env=make_environment(), check=True)
    os.close(terminal)
    shown = b""
    with suppress(OSError):  # which says that the terminal is closed, after everything is read
        while chunk := os.read(ours, 2**16):
            shown += chunk
    os.close(ours)
    assert b"100%" in shown
    assert b"1 of 1" not in shown


def test_what_a_server_sends_cannot_control_the_terminal(server, tmp_path):
    server.books = {900001: redirect_to("http://[\x1b[31mred")}
    result = download(server.url, tmp_path, 900001)
    assert "\x1b" not in result.stderr
