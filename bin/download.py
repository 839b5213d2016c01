"""Fetches science fiction from Project Gutenberg into data/books, each book without the licence around it.

A book gets its name when it is whole: after any accident the same command fetches just what is missing.
"""

import argparse
import csv
import os
import re
import signal
import sys
import time
import unicodedata
from pathlib import Path
from typing import NoReturn

import requests
from tqdm import tqdm
from urllib3 import Retry, exceptions

ROOT = Path(__file__).resolve().parent.parent
LARGEST = 20_000_000  # bytes of a book
BUSY = (429, 500, 502, 503, 504)  # answers that may change a little later
FAILURES = (  # what the libraries raise, in a user's words; so many in a row end the run, 0 never does
    ((exceptions.NewConnectionError, exceptions.ConnectTimeoutError), "no connection to the server", 3),
    (exceptions.ReadTimeoutError, "the server fell silent", 3),
    (requests.TooManyRedirects, "the server redirects without end", 0),
    (Exception, "the connection broke", 10),
)
MARKER = r"^[ \t]*\*{3}[ \t]*%s[ \t]+OF[ \t]+TH(?:E|IS)[ \t]+PROJECT[ \t]+GUTENBERG"
# A long title goes on in the next lines, up to the closing stars.
START = re.compile(MARKER % "START" + r"(?:.*?(?:\n.+?){0,2}?\*{3}[ \t]*$|.*$)", re.M | re.I)
END = re.compile(MARKER % "END", re.M | re.I)
LAST_WORDS = re.compile(r"^[ \t]*End of (?:the |this )?Project Gutenberg.*(?:\n.+){0,3}\s*\Z", re.M | re.I)


class BookError(Exception):
    """Why one book cannot be had, and how many such in a row end the run (0: the others may be had)."""


def fetch(session: requests.Session, url: str, timeout: float, pause: float) -> bytes:
    """The bytes behind a URL. Raises BookError."""
    for attempt in range(3):  # Retry ends where an answer begins; one that breaks off is asked for again here
        time.sleep(attempt * pause)
        try:
            with session.get(url, stream=True, timeout=(min(timeout, 10), timeout)) as response:
                if (status := response.status_code) != 200:
                    raise BookError(f"the server answers {status}", 10 if status in BUSY else 0)
                body, deadline = bytearray(), time.monotonic() + 10 * timeout
                while chunk := response.raw.read1(2**16, decode_content=True):  # read() would wait for all
                    body += chunk
                    if len(body) > LARGEST:
                        raise BookError(f"larger than {LARGEST // 10**6} MB", 0)
                    if time.monotonic() > deadline:
                        raise BookError(f"not whole after {10 * timeout:.0f} seconds", 10)
            return bytes(body)  # urllib3 has held it against Content-Length
        except (requests.RequestException, exceptions.HTTPError) as error:
            cause = getattr(error.args[0] if error.args else None, "reason", error)
            words, enough = next(row[1:] for row in FAILURES if isinstance(cause, row[0]))
            if attempt == 2 or isinstance(error, requests.RequestException):
                raise BookError(f"{words} ({type(cause).__name__})", enough) from error


def decode(body: bytes) -> str:
    """The text of a file: UTF-8 or Latin-1 becomes NFC, every line end LF. Raises BookError."""
    stated = re.findall(rb"Character set encoding:([^\r\n]*)", body[:20_000], re.I)[:1]
    try:  # UTF-8 first: many headers were never told that their book became it
        text = body.decode().replace("\ufeff", "")  # the byte order mark
    except UnicodeDecodeError as error:
        if re.search(rb"utf", b"".join(stated), re.I):
            raise BookError(f"not the UTF-8 that its header states (byte {error.start})", 0) from error
        latin = re.search(rb"8859-1\b|latin-?1\b", b"".join(stated), re.I)
        text = body.decode("latin-1" if latin else "cp1252", errors="replace")
    return unicodedata.normalize("NFC", re.sub(r"\r*\n|\r", "\n", text))


def split(text: str) -> tuple[str, str]:
    """The title and the book in the text of a file. Raises BookError."""
    first = START.search(text)
    end = END.search(text, first.end()) if first else None
    if not text.strip() or re.match(r"\s*<[!?a-z]", text, re.I):
        raise BookError("an HTML page instead of a book" if text.strip() else "an empty file", 0)
    if not first or not end:  # nobody knows where the licence ends, or whether the book is whole
        raise BookError(f"no {'END' if first else 'START'} marker of Project Gutenberg", 0)
    *_, start = START.finditer(text, 0, end.start())  # an old marker may follow the new one
    book = LAST_WORDS.sub("", text[start.end() : end.start()])
    if not (book := re.sub(r"\A\s*\n", "", book).rstrip()):  # the first line keeps its indent
        raise BookError("nothing between its markers", 0)
    title = re.search(r"^Title:(.*)", text[: first.start()], re.M | re.I)
    return title[1] if title else "", book + "\n"


def write(folder: Path, number: int, title: str, text: str) -> None:
    """Writes a book under a name of safe letters, which never means a part of it. Raises OSError."""
    plain = re.sub(r"[\u0300-\u036f]", "", unicodedata.normalize("NFKD", title))  # without accents
    slug = re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")[:60].rstrip("-") or "untitled"
    beside = folder / f".{number}.{os.getpid()}.part"
    try:
        with open(beside, "wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, folder / f"{number}-{slug}.txt")
    finally:
        beside.unlink(missing_ok=True)


def download(titles: dict[int, str], args: argparse.Namespace) -> tuple[dict[int, str], int]:
    """Fetches books, one without a title named by its header. Returns failures, and how many are untried."""
    args.output.mkdir(parents=True, exist_ok=True)
    for left in args.output.glob(".[0-9]*.part"):  # by a killed run
        left.unlink(missing_ok=True)
    session, failed, ends = requests.Session(), {}, []
    session.headers["User-Agent"] = f"scifi-gpt-download (python-requests/{requests.__version__})"
    waits = {"backoff_factor": args.pause, "retry_after_max": 60}  # seconds
    retry = Retry(3, status_forcelist=BUSY, raise_on_status=False, **waits)
    session.adapters = dict.fromkeys(session.adapters, requests.adapters.HTTPAdapter(max_retries=retry))
    for number in tqdm(titles, unit="book", dynamic_ncols=True, disable=not titles):
        time.sleep(args.pause if ends else 0)
        url, enough = f"{args.mirror.rstrip('/')}/cache/epub/{number}/pg{number}.txt", 0
        try:
            title, text = split(decode(fetch(session, url, args.timeout, args.pause)))
            write(args.output, number, titles[number] or title, text)
        except BookError as error:
            failed[number], enough = error.args
        ends.append(enough)
        if enough and ends[-enough:] == [enough] * enough:
            break
    return failed, len(titles) - len(ends)


class CommandLine(argparse.ArgumentParser):
    """Mistakes answered with one line."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with that line and status 2."""
        self.exit(2, f"error: {message} (see --help)\n")


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = CommandLine(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("ids", nargs="*", type=int, metavar="ID", help="just these books; else the core ones")
    parser.add_argument("--all", action="store_true", help="every book of the catalogue")
    parser.add_argument("--list", nargs="?", const="", metavar="WORD", help="show the books (with this word)")
    parser.add_argument("--mirror", metavar="URL", default="https://www.gutenberg.org", help="the server")
    parser.add_argument("--output", metavar="DIR", type=Path, default=ROOT / "data/books", help="the folder")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between requests")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds to wait for a silent server")
    args = parser.parse_args()
    for flag, value, valid, range_ in (
        ("ID", args.ids, all(0 < number < 10**9 for number in args.ids), "whole numbers from 1"),
        ("--mirror", args.mirror, re.match(r"https?://[\w[]", args.mirror), "http://... or https://..."),
        ("--pause", args.pause, 0 <= args.pause <= 3600, "from 0 to 3600"),
        ("--timeout", args.timeout, 0 < args.timeout <= 3600, "above 0, up to 3600"),
    ):
        if not valid:
            parser.error(f"{flag} is {value!r}, but must be {range_}")
    return args


def main() -> None:
    """Does what the command line asks for."""
    args = parse()
    try:
        with open(ROOT / "data/catalogue.csv", encoding="utf-8", newline="") as file:
            rows = {int(row["id"]): row for row in csv.DictReader(file, restval="")}
        here = {path.name.partition("-")[0] for path in args.output.glob("*-*.txt")}
        if args.list is not None:
            signal.signal(getattr(signal, "SIGPIPE", signal.SIGINT), signal.SIG_DFL)  # a reader may leave
            sys.stdout.reconfigure(encoding="utf-8", errors="replace")
            print(f"{'number':>6}  {'title':48}  {'author':30}  core  here")
            for n, row in rows.items():
                title, author, core = row["title"], row["author"], "core" * (row["core"] == "1")
                if args.list.casefold() in f"{title}\n{author}".casefold():
                    end = f"{core:4}  here" if str(n) in here else core
                    print(f"{n:6}  {title:48.48}  {author:30.30}  {end}".rstrip())
            return
        of_catalogue = [n for n, row in rows.items() if args.all or (row["core"] == "1" and not args.ids)]
        wanted = dict.fromkeys(args.ids + of_catalogue)
        missing = {n: rows[n]["title"] if n in rows else "" for n in wanted if str(n) not in here}
        failed, untried = download(missing, args)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        sys.exit(f"error: {error.filename or args.output}: {error.strerror or error}")
    except (KeyError, ValueError, csv.Error) as error:
        sys.exit(f"error: data/catalogue.csv is damaged ({error!r}): take it from the project again")
    count = f"{len(wanted) - len(missing)} were here, {len(missing) - len(failed) - untried} fetched"
    lines = [f"{number}: {reason}" for number, reason in failed.items()]
    lines += [f"error: gave up before {untried} more; try the same command later"] * bool(untried)
    print(f"books: {count}, {len(failed)} failed", *lines, sep="\n", file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
