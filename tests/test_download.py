"""What bin/download.py promises, against a server on loopback that misbehaves on purpose."""

import csv
import os
import random
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import unicodedata
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STORY = "It was late.\n\n  The ship came down.\n" + "Nobody saw it. " * 200


def gutenberg(
    story=STORY, title="The Ship", start="*** START OF THE PROJECT GUTENBERG EBOOK THE SHIP ***", **more
):
    """A file as Gutenberg serves it."""
    end = more.get("end", "*** END OF THE PROJECT GUTENBERG EBOOK THE SHIP ***")
    encoding = more.get("encoding", "UTF-8")
    header = f"The Project Gutenberg EBook\n\nTitle: {title}\n\nCharacter set encoding: {encoding}\n"
    return f"{header}\n{start}\n\n\n{story}\n\n\n{end}\n\n*** START: FULL LICENSE ***\nlicence\n"


class Server(ThreadingHTTPServer):
    """Answers for book n what `books[n]` does; bytes and text are sent as they are. Counts requests."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.books, self.asked, self.agents, self.closing = {}, [], set(), threading.Event()

    def handle_error(self, request, client_address):
        """Silence about clients that left."""

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        number = int(re.fullmatch(r"/cache/epub/([0-9]+)/pg\1\.txt", self.path)[1])
        self.server.asked.append(number)
        self.server.agents.add(self.headers["User-Agent"])
        answer = self.server.books.get(number, status(404))
        answer(self) if callable(answer) else self.answer(answer)

    def answer(self, body, code=200, length=None, **headers):
        body = body.encode() if isinstance(body, str) else body
        self.send_response(code)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """Silence."""


def status(code, **headers):
    return lambda handler: handler.answer("", code, **headers)


def short(handler):
    handler.answer(gutenberg(), length=10**6)
    handler.close_connection = True


def reset(handler):
    handler.answer(gutenberg()[:500], length=10**6)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.close_connection = True


def stall(handler):
    handler.answer(gutenberg()[:500], length=10**6)
    handler.server.closing.wait(30)


def send_forever(piece, pause):
    def answer(handler):
        handler.answer("", length=10**9)
        with suppress(OSError):
            while not handler.server.closing.wait(pause):
                handler.wfile.write(piece)

    return answer


def first(failure, times):
    """Fails so many times, then serves the book."""
    left = [failure] * times
    return lambda handler: left.pop()(handler) if left else handler.answer(gutenberg())


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


def command(server, folder, *args, timeout=0.5):
    words = [
        "--mirror",
        getattr(server, "url", server),
        "--output",
        folder,
        "--pause",
        0,
        "--timeout",
        timeout,
    ]
    return [sys.executable, str(ROOT / "bin/download.py"), *map(str, args), *map(str, words)]


def environment():
    return {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}


def download(server, folder, *args, **options):
    limit = options.pop("preexec_fn", None)
    return subprocess.run(
        command(server, folder, *args, **options),
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(),
        preexec_fn=limit,
    )


def start(server, folder, *args):
    return subprocess.Popen(
        command(server, folder, *args),
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def only_book(folder):
    (path,) = folder.iterdir()
    return path.read_bytes().decode()


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def is_error(result, code):
    assert result.returncode == code and "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return line


MISSING = {
    "404": (status(404), "404"),
    "500 for good": (status(500), "500"),
    "503 for good": (status(503), "503"),
    "short": (short, "broke"),
    "reset": (reset, "broke"),
    "stalled": (stall, "silent"),
    "dripping": (send_forever(b"x", 0.1), "not whole after"),
    "endless": (send_forever(b"x" * 2**18, 0), "20 MB"),
    "html": ("<!DOCTYPE html><html>" + gutenberg() + "</html>", "HTML"),
    "empty": ("", "empty"),
    "no start": ("Just a text.\n" * 99, "START"),
    "no end": (gutenberg(end=""), "END"),
    "nothing between": (gutenberg(story=""), "nothing"),
    "not its utf-8": (gutenberg().encode() + b"\xff", "UTF-8"),
    "redirect loop": (lambda handler: handler.answer("", 302, Location=handler.path), "redirects"),
}


@pytest.mark.parametrize(("answer", "reason"), MISSING.values(), ids=MISSING)
def test_a_book_that_cannot_be_had_is_named_with_its_reason_and_the_rest_goes_on(
    server, tmp_path, answer, reason
):
    server.books = {900001: gutenberg(), 900002: answer, 900003: gutenberg()}
    result = download(server, tmp_path / "books", 900001, 900002, 900003, timeout=0.3)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("900002: ")]
    assert reason in line
    assert names(tmp_path / "books") == ["900001-the-ship.txt", "900003-the-ship.txt"]


RETRIED = {str(code): (status(code), 2) for code in (500, 502, 503, 504)}
RETRIED |= {
    "429": (status(429, Retry_After="1"), 1),
    "short": (short, 1),
    "reset": (reset, 2),
    "stalled": (stall, 1),
}


@pytest.mark.parametrize(("failure", "times"), RETRIED.values(), ids=RETRIED)
def test_a_passing_failure_is_tried_again(server, tmp_path, failure, times):
    server.books[900001] = first(failure, times)
    began = time.monotonic()
    assert download(server, tmp_path, 900001).returncode == 0
    assert server.asked == [900001] * (times + 1)
    assert failure is not RETRIED["429"][0] or time.monotonic() - began >= 1
    assert names(tmp_path) == ["900001-the-ship.txt"]


def test_without_a_connection_it_gives_up_early_and_says_so(tmp_path):
    with socket.socket() as closed:  # bound, but nobody listens
        closed.bind(("127.0.0.1", 0))
        result = download(f"http://127.0.0.1:{closed.getsockname()[1]}", tmp_path)
    assert "gave up" in is_error(result, 1) and result.stderr.count("no connection") == 3


def test_after_a_failure_only_the_missing_is_fetched(server, tmp_path):
    server.books = {900001: gutenberg(), 900002: status(404)}
    download(server, tmp_path, 900001, 900002)
    server.asked.clear()
    server.books[900002] = gutenberg()
    assert download(server, tmp_path, 900001, 900002).returncode == 0
    assert server.asked == [900002] and len(names(tmp_path)) == 2
    assert download(server, tmp_path, 900001, 900002).returncode == 0 and server.asked == [900002]


def test_it_says_who_it_is(server, tmp_path):
    server.books[900001] = gutenberg()
    download(server, tmp_path, 900001)
    (agent,) = server.agents
    assert agent.startswith("scifi-gpt")


STARTS = [
    "*** START OF THE PROJECT GUTENBERG EBOOK THE SHIP ***",
    "*** START OF THIS PROJECT GUTENBERG EBOOK THE SHIP ***",
    "***START OF THE PROJECT GUTENBERG EBOOK THE SHIP***",
    "*** START OF THIS PROJECT GUTENBERG EBOOK A LONG\nTITLE IN TWO LINES ***",
    "*** START OF THE PROJECT GUTENBERG EBOOK A ***\n\n***START OF THIS PROJECT GUTENBERG EBOOK A***",
]
LAST_WORDS = [
    "",
    "End of the Project Gutenberg EBook of The Ship,\nby Nobody\n\n",
    "End of Project Gutenberg\u2019s Ship\n",
]


@pytest.mark.parametrize("start", STARTS)
def test_nothing_of_the_licence_stays_and_nothing_of_the_story_goes(server, tmp_path, start):
    end = start.split("\n\n")[-1].replace("START", "END")
    ends = [last_words + end for last_words in LAST_WORDS]
    server.books = {900001 + i: gutenberg(start=start, end=end) for i, end in enumerate(ends)}
    assert download(server, tmp_path, *server.books).returncode == 0
    assert [path.read_text() for path in tmp_path.iterdir()] == [STORY.rstrip() + "\n"] * len(ends)


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r", "\r\r\n"])
def test_every_line_end_becomes_a_line_feed(server, tmp_path, line_end):
    server.books[900001] = ("\ufeff" + gutenberg().replace("\n", line_end)).encode()
    download(server, tmp_path, 900001)
    assert only_book(tmp_path) == STORY.rstrip() + "\n"


def test_line_ends_may_be_mixed(server, tmp_path):
    server.books[900001] = gutenberg("a\r\nb\rc\nd\r\r\ne\n\nf").encode()
    download(server, tmp_path, 900001)
    assert only_book(tmp_path) == "a\nb\nc\nd\ne\n\nf\n"


@pytest.mark.parametrize(
    ("stated", "used"),
    [
        ("UTF-8", "utf-8-sig"),
        ("ASCII", "utf-8"),
        ("ISO-8859-1", "utf-8"),
        ("ISO-8859-1", "latin-1"),
        ("Latin-1", "latin-1"),
        ("ASCII", "cp1252"),
    ],
)
def test_the_encoding_is_found(server, tmp_path, stated, used):
    story = "“Ça ira”, dit-elle. Für Ångström." if used != "latin-1" else "Ça ira, dit-elle. Für Ångström."
    server.books[900001] = gutenberg(story, encoding=stated).encode(used)
    assert download(server, tmp_path, 900001).returncode == 0
    assert only_book(tmp_path) == story + "\n"


def test_unicode_is_composed(server, tmp_path):
    server.books[900001] = gutenberg(unicodedata.normalize("NFD", "Élan, 각"))
    download(server, tmp_path, 900001)
    assert only_book(tmp_path) == "Élan, 각\n"


HOSTILE = [
    "../../x",
    "/etc/passwd",
    "🚀",
    "",
    "a\x00b\x1b[31m",
    "Ünïcödé—Day",
    "x" * 500,
    "CON",
    ". .",
    "a\\b:c*?",
]


def test_a_file_name_is_made_of_safe_letters_whatever_the_header_says(server, tmp_path):
    server.books = {900001 + i: gutenberg(title=title) for i, title in enumerate(HOSTILE)}
    assert download(server, tmp_path / "deep/er/books", *server.books).returncode == 0
    for number, name in zip(server.books, names(tmp_path / "deep/er/books"), strict=True):
        assert re.fullmatch(rf"{number}-[a-z0-9]+(-[a-z0-9]+)*\.txt", name) and len(name) < 80
    assert names(tmp_path) == ["deep"]


def test_accents_fold_and_dashes_part(server, tmp_path):
    server.books[900001] = gutenberg(title="Ünïcödé—Day")
    download(server, tmp_path, 900001)
    assert names(tmp_path) == ["900001-unicode-day.txt"]


def test_after_kill_9_only_whole_books_have_names_and_a_later_run_clears_up(server, tmp_path):
    whole = "The ship came down.\n" * 300_000
    server.books = dict.fromkeys(range(900001, 900031), gutenberg(whole))
    generator = random.Random(1)
    for _ in range(5):
        before = set(names(tmp_path))
        run = start(server, tmp_path, *server.books)
        wait_for(lambda before=before: set(names(tmp_path)) - before)  # it begins to write
        time.sleep(generator.random() * 0.02)
        run.kill()
        run.communicate(timeout=20)
        assert all(path.read_text() == whole for path in tmp_path.glob("*.txt"))
    (tmp_path / ".900001.77.part").write_text("half")
    here = [int(name[:6]) for name in names(tmp_path) if name.endswith(".txt")]
    assert download(server, tmp_path, *here, 900030).returncode == 0
    assert all(name.endswith(".txt") for name in names(tmp_path))


def test_ctrl_c_is_one_quiet_line_and_status_130(server, tmp_path):
    server.books = {900001: gutenberg(), 900002: stall}
    run = start(server, tmp_path, "--timeout", 30, 900001, 900002)
    wait_for(lambda: 900002 in server.asked)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=20)
    assert run.returncode == 130 and "Traceback" not in said
    assert said.splitlines()[-1] == "stopped; the same command goes on"
    assert names(tmp_path) == ["900001-the-ship.txt"]


def test_a_full_disk_stops_the_run_with_one_line(server, tmp_path):
    server.books = {n: gutenberg() for n in (900001, 900002)}
    limit = (1000, resource.RLIM_INFINITY)
    result = download(
        server, tmp_path, *server.books, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    )
    assert str(tmp_path) in is_error(result, 1)
    assert server.asked == [900001] and names(tmp_path) == []


def test_an_impossible_folder_is_one_line(server, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in is_error(download(server, tmp_path / "file/books", 900001), 1)
    assert server.asked == []


MISTAKES = [
    ("x",),
    ("0",),
    ("--", "-5"),
    ("--mirror", "ftp://x"),
    ("--pause", "-1"),
    ("--timeout", "nan"),
    ("--what",),
]


@pytest.mark.parametrize("args", MISTAKES)
def test_a_wrong_argument_is_one_line_and_status_2(args):
    words = [sys.executable, ROOT / "bin/download.py", *args]
    result = subprocess.run(words, capture_output=True, text=True, timeout=20)
    assert is_error(result, 2) and result.stderr.count("\n") == 1 and result.stdout == ""


def catalogue():
    with open(ROOT / "data/catalogue.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("flags", [(), ("--all",)])
def test_by_default_the_core_is_wanted_and_with_all_the_whole_catalogue(server, tmp_path, flags):
    wanted = [int(row["id"]) for row in catalogue() if flags or row["core"] == "1"]
    for number in wanted[3:]:
        (tmp_path / f"{number}-here.txt").write_text("here")
    server.books = {n: gutenberg() for n in wanted}
    assert download(server, tmp_path, *flags).returncode == 0
    assert server.asked == wanted[:3]


def test_a_book_of_the_catalogue_has_the_name_that_the_catalogue_gives(server, tmp_path):
    server.books[35] = gutenberg(title="Something Else")
    download(server, tmp_path, 35)
    assert names(tmp_path) == ["35-the-time-machine.txt"]


@pytest.mark.parametrize("word", ["", "WELLS", "moon"])
def test_the_list_shows_each_book_with_the_word(tmp_path, word):
    (tmp_path / "35-x.txt").write_text("here")
    result = download("http://127.0.0.1", tmp_path, f"--list={word}")
    assert result.returncode == 0 and result.stderr == ""
    rows = [row for row in catalogue() if word.lower() in (row["title"] + "\n" + row["author"]).lower()]
    shown = result.stdout.splitlines()[1:]
    assert [line.split()[0] for line in shown] == [row["id"] for row in rows]
    assert [line.split()[0] for line in shown if line.endswith("here")] == ["35"] * (word != "moon")
    assert max(map(len, shown)) <= 100


def test_the_list_is_quiet_on_a_closed_pipe(tmp_path):
    words = command("http://127.0.0.1", tmp_path, "--list")
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        run.stdout.readline()
        run.stdout.close()
        assert run.stderr.read() == b""
