"""Download science fiction from Project Gutenberg into data/books, one text file per book.

The licence around a book and the notes of the volunteers who typed it are removed. A file
gets its name only when it is complete, and a book that is already there is not downloaded
again. After an interruption, run the same command again to download what is missing.
"""

import argparse
import codecs
import csv
import os
import re
import sys
import time
import unicodedata
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import requests
from tqdm import tqdm
from urllib3.exceptions import HTTPError, NewConnectionError, ReadTimeoutError

ROOT = Path(__file__).resolve().parent.parent
CATALOGUE = ROOT / "data/catalogue.csv"
BOOKS = ROOT / "data/books"

# The terms of use of www.gutenberg.org ask programs to use a mirror instead of the website.
# These two are Project Gutenberg's own, and hold the files under cache/epub.
MIRROR = "https://gutenberg.pglaf.org"
SECOND_MIRROR = "https://aleph.pglaf.org"
PAUSE = 2.0  # seconds between requests, as Project Gutenberg asks of programs
TIMEOUT = 30.0  # seconds

ATTEMPTS = 3  # for one book, when the failure may pass
LONGEST_WAIT = 60  # seconds between two attempts, whatever the server asks for
LARGEST_BOOK = 20_000_000  # bytes
OLDEST_TEMPORARY = 600  # seconds; a file that is being written is much younger


# ---------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------

# Why a book was not downloaded, when the cause lies with the server or on the way to it:
# how many books in a row may fail before the run gives up, and what to tell the user then.
PATIENCE = {
    "connection": (3, "there is no connection to the server"),
    "silence": (3, "the server does not answer"),
    "certificate": (3, "there is no secure connection to the server"),
    "proxy": (3, "the proxy does not work; check HTTPS_PROXY and HTTP_PROXY"),
    "refusal": (3, "the server blocks this machine; wait a day"),
    "interruption": (10, "the server or the connection to it is unreliable"),
    "absence": (20, "the server does not seem to have the books; check --mirror"),
}
REFUSALS = (401, 403, 429)  # HTTP status codes
PASSING_STATUSES = (429, 500, 502, 503, 504)  # may be different after a short wait


class DownloadError(Exception):
    """A message for the user, after which the run ends."""


class BookError(Exception):
    """A message about one book that cannot be downloaded.

    `kind` is a key of PATIENCE, or None if the book itself is the cause. `may_pass` says
    whether another attempt makes sense, and `wait` how many seconds the server asks for.
    """

    def __init__(
        self, message: str, kind: str | None = None, may_pass: bool = False, wait: int = 0
    ):
        super().__init__(message)
        self.kind = kind
        self.may_pass = may_pass
        self.wait = wait


def connection_error(error: Exception) -> BookError:
    """Explain in a user's words what requests, urllib3 or Python raised during a request."""
    for variable in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        bundle = os.environ.get(variable)
        if bundle and not os.path.exists(bundle) and bundle in str(error):
            return BookError(f"{variable} names {bundle}, which does not exist", "certificate")

    cause = root_cause(error)
    name = type(cause).__name__
    if isinstance(error, requests.exceptions.SSLError):
        # For example "certificate verify failed: self-signed certificate".
        detail = re.search(r"certificate verify failed: ([^(]+)", str(error))
        if detail:
            message = f"the server's certificate is not trusted: {detail[1].strip()}"
        else:
            message = f"no secure connection ({name})"
        return BookError(message, "certificate")

    if isinstance(error, requests.exceptions.ProxyError):
        return BookError("the proxy cannot be reached, or refuses", "proxy")
    if isinstance(cause, NewConnectionError) or isinstance(error, requests.ConnectTimeout):
        return BookError(f"no connection to the server ({name})", "connection", may_pass=True)
    if isinstance(error, (requests.Timeout, ReadTimeoutError)):
        return BookError("the server fell silent", "silence", may_pass=True)
    if isinstance(error, requests.TooManyRedirects):
        return BookError("the server redirects without end", "absence")
    if isinstance(error, ValueError):  # also the base class of requests.exceptions.InvalidURL
        return BookError(f"its address, or a redirect, cannot be used: {error}", "absence")
    return BookError(f"the connection broke ({name})", "interruption", may_pass=True)


def root_cause(error: Exception) -> Exception:
    """Return what urllib3 raised, which requests wraps in an error that says less."""
    cause = error
    if isinstance(error, requests.RequestException) and error.args:
        cause = error.args[0]
    cause = getattr(cause, "reason", None) or cause
    return cause if isinstance(cause, Exception) else error


# ---------------------------------------------------------------------------------------
# The server
# ---------------------------------------------------------------------------------------


def fetch(session: requests.Session, url: str, timeout: float, pause: float) -> bytes:
    """Return the content behind a URL, after several attempts if necessary."""
    for attempt in range(1, ATTEMPTS):
        try:
            return fetch_once(session, url, timeout)
        except BookError as error:
            if not error.may_pass:
                raise
            time.sleep(max(attempt * pause, min(error.wait, LONGEST_WAIT)))
    return fetch_once(session, url, timeout)


def fetch_once(session: requests.Session, url: str, timeout: float) -> bytes:
    try:
        # A server that cannot be reached in ten seconds will not be reached at all.
        timeouts = (min(timeout, 10), timeout)
        with session.get(url, stream=True, timeout=timeouts) as response:
            check_status(response)
            return read_body(response, deadline=time.monotonic() + 10 * timeout)
    except (OSError, HTTPError, ValueError) as error:
        # requests and urllib3 let through errors of Python too: an OSError for a missing
        # certificate file, a ValueError for an address that cannot be parsed.
        raise connection_error(error) from error


def check_status(response: requests.Response) -> None:
    status = response.status_code
    if status == 200:
        return

    asked = response.headers.get("Retry-After", "")
    wait = int(asked) if re.fullmatch("[0-9]{1,9}", asked) else 0
    if status in REFUSALS:
        kind = "refusal"
    elif status >= 500:
        kind = "interruption"
    else:
        kind = "absence"
    may_pass = status in PASSING_STATUSES
    raise BookError(f"the server answers {status}", kind, may_pass, wait)


def read_body(response: requests.Response, deadline: float) -> bytes:
    """Read an answer to its end. urllib3 compares its length with the announced one."""
    body = bytearray()
    while True:
        # read1 returns what has arrived. read would wait for the whole amount, forever if a
        # server sends a byte now and then.
        chunk = response.raw.read1(2**16, decode_content=True)
        if not chunk:
            return bytes(body)
        body += chunk
        if len(body) > LARGEST_BOOK:
            raise BookError(f"larger than {LARGEST_BOOK // 10**6} MB")
        if time.monotonic() > deadline:
            raise BookError("the server is too slow", "interruption")


# ---------------------------------------------------------------------------------------
# From the bytes of a file to the text of a book
# ---------------------------------------------------------------------------------------


def decode(body: bytes) -> str:
    """Return the text of a file in Unicode's composed form (NFC), with LF line ends.

    The bytes say more than the header, which often still names the encoding that a file had
    before somebody converted it. UTF-8 comes first, because text in another encoding is
    practically never valid UTF-8. Windows-1252 contains the characters of Latin-1.
    """
    for encoding in ("utf-8", stated_encoding(body), "cp1252"):
        try:
            text = body.decode(encoding)
        except ValueError:
            continue
        # ISO 8859 decodes any byte, Windows's quotation marks as control characters.
        if encoding != "utf-8" and re.search(r"[\x80-\x9f]", text):
            continue
        text = text.replace("\ufeff", "")  # byte order marks
        text = re.sub(r"\r*\n|\r", "\n", text)
        return unicodedata.normalize("NFC", text)
    raise BookError("neither UTF-8, nor the encoding that its header states, nor Windows-1252")


def stated_encoding(body: bytes) -> str:
    """Return the encoding that the header of a file names, if it is a usual one of one byte."""
    stated = re.search(rb"Character set encoding:[ \t]*([\w-]+)", body[:20_000], re.I)
    try:
        name = codecs.lookup(stated[1].decode("ascii")).name if stated else ""
    except (LookupError, ValueError):
        name = ""
    return name if name.startswith(("iso8859", "cp125", "koi8", "mac")) else "cp1252"


MARKER = r"^[ \t]*\*{3}[ \t]*%s[ \t]+OF[ \t]+TH(?:E|IS)[ \t]+PROJECT[ \t]+GUTENBERG"
# A long title continues on the next lines, up to the closing stars.
START_MARKER = re.compile(
    MARKER % "START" + r"(?:.*?(?:\n.+?){0,2}?\*{3}[ \t]*$|.*$)", re.MULTILINE | re.IGNORECASE
)
END_MARKER = re.compile(MARKER % "END", re.MULTILINE | re.IGNORECASE)
HTML = re.compile(r"\s*<[!?a-z]", re.IGNORECASE)
TITLE = re.compile(r"^Title:(.*)", re.MULTILINE | re.IGNORECASE)


def find_book(text: str) -> tuple[str, str]:
    """Return the title and the book in the text of a file.

    Without both markers nobody knows where the licence ends, or whether the file is complete.
    """
    if not text.strip():
        raise BookError("an empty file")
    if HTML.match(text):
        raise BookError("an HTML page instead of a book", "refusal")

    start = START_MARKER.search(text)
    if start is None:
        raise BookError("no START marker of Project Gutenberg")
    title = TITLE.search(text, 0, start.start())
    end = END_MARKER.search(text, start.end())
    if end is None:
        raise BookError("no END marker of Project Gutenberg")

    # Some files have an old marker after the new one. The last one counts.
    last_start = list(START_MARKER.finditer(text, 0, end.start()))[-1]
    book = remove_notes(text[last_start.end() : end.start()])
    if not book:
        raise BookError("nothing between its markers")
    return title[1] if title else "", book


# Volunteers leave their own text inside the markers: who produced the file, at the very
# beginning; notes of the transcriber, near the beginning or the end; and a footer, at the end.
# A paragraph is removed only if it looks like nothing else. When in doubt, it stays.

PARAGRAPH = re.compile(r"(?:.*\S.*\n)+(?:[^\S\n]*\n)*")  # with the blank lines after it
EDGE = 20  # paragraphs; "near" the beginning or the end
LONGEST_CREDITS = 1000  # characters
LONGEST_APPENDIX = 100  # lines after the footer, for example a list of corrections

# "Produced by John Bean; Diane Bean and David Widger", and nothing else
NAME = r"(?:[A-Z][\w.'\u2019-]*|and|the|of|an|de|la|van|von|der|&)"
NAMES_ONLY = re.compile(rf"Produced\s+by\s+{NAME}(?:[,;]?\s+{NAME})*[.,]?\s*")
CREDITS = re.compile(
    r"""
    # "Produced by Greg Weeks and the Online Distributed Proofreading Team at ..."
    Produced\s+by\b.*(?:Proofread|Project\s+Gutenberg|pgdp|https?:|HTML\s+version)
    # "This Project Gutenberg Etext was prepared by ...", "E-text prepared by ..."
    | (?:This\s+)?(?:Project\s+Gutenberg(?:'s)?\s+)?e-?(?:text|book)\s+(?:was\s+)?(?:first\s+)?
      (?:prepared|produced|created|done|typed|scanned|transcribed)\s+by\b
    # "Transcribed from the 1891 George Newnes edition by David Price, email ..."
    | Transcribed\s+from\s+the\s+\d{4}\b.*\bedition\b.*\bby\b
    | Note:\s+Project\s+Gutenberg\s+also\s+has\b
    | Note:\s+Images\s+of\s+the\s+original\s+pages\s+are\s+available\b
    """,
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)

# "[Transcriber's Note: ...]", the same in a frame of + - |, or a heading on a line of its own.
NOTE = re.compile(
    r"[\s\[*_+|=-]*Transcribers?\W?s?\W?\s+(?:Notes?|(?:List\s+of\s+)?Corrections|Errata)\b",
    re.IGNORECASE,
)
NOTE_HEADING = re.compile(NOTE.pattern + r"[\s:.*_]*", re.IGNORECASE)
ABOUT_THE_TEXT = re.compile(
    r"""
    \be-?(?:text|book)s?\b | Project\s+Gutenberg | copyright | typographical | typos?\b
    | spelling | punctuation | hyphenat | italic | printer\W?s\W?\s+error | HTML | errata
    | correct(?:ed|ions?)\b | chang(?:es|ed)\s+to\b
    """,
    re.VERBOSE | re.IGNORECASE,
)

FOOTER = re.compile(
    r"""
    [\s*]*(?:
      # "End of the Project Gutenberg EBook of ...", "The end of Project Gutenberg etext of ..."
      (?:The\s+)?End\s+(?:of\s+)?(?:the\s+|this\s+)?Project\s+Gutenberg(?:\Ws)?\s+
      (?:e-?text|e-?book|edition)\b
      # "End of Project Gutenberg's The Time Machine, by H. G. Wells"
      | End\s+of\s+(?:the\s+)?Project\s+Gutenberg\Ws\s
    )
    """,
    re.VERBOSE | re.IGNORECASE,
)


def remove_notes(book: str) -> str:
    """Return the text between the markers without what volunteers added to it."""
    book = re.sub(r"\A\s*\n", "", book).rstrip()  # the first line keeps its indentation
    paragraphs = PARAGRAPH.findall(book + "\n")
    del paragraphs[find_footer(paragraphs) :]

    while paragraphs and is_credits(paragraphs[0]):
        del paragraphs[0]

    # From the end to the beginning, so that removing a note moves no paragraph to be visited.
    for index in reversed(range(len(paragraphs))):
        if index < EDGE or index >= len(paragraphs) - EDGE:
            del paragraphs[index : index + note_length(paragraphs, index)]

    while paragraphs and is_credits(paragraphs[0]):  # may follow a note
        del paragraphs[0]

    return "".join(paragraphs).rstrip() + "\n" if paragraphs else ""


def is_credits(paragraph: str) -> bool:
    """Tell whether a paragraph, the first one of a book, names those who produced the file."""
    paragraph = paragraph.strip()
    if len(paragraph) > LONGEST_CREDITS:
        return False
    return bool(CREDITS.match(paragraph) or NAMES_ONLY.fullmatch(paragraph))


def note_length(paragraphs: list[str], start: int) -> int:
    """Return how many paragraphs the transcriber's note at `start` has, and 0 if it is none."""
    first = paragraphs[start]
    if not NOTE.match(first):
        return 0

    end = start + 1
    if first.lstrip().startswith("["):
        # A note in brackets ends with its bracket.
        while not paragraphs[end - 1].rstrip().endswith("]"):
            if end == len(paragraphs) or end - start == EDGE:
                return 0
            end += 1
    elif all(ABOUT_THE_TEXT.search(paragraph) for paragraph in paragraphs[end:]):
        end = len(paragraphs)  # at the end of a book, a note may have several paragraphs
    elif NOTE_HEADING.fullmatch(first):
        end += 1  # the note itself follows the heading

    note = "".join(paragraphs[start:end])
    return end - start if ABOUT_THE_TEXT.search(note) else 0


def find_footer(paragraphs: list[str]) -> int:
    """Return the index of the footer, or the number of paragraphs if there is none."""
    footer = len(paragraphs)
    lines_after = 0
    for index in reversed(range(len(paragraphs))):
        if FOOTER.match(paragraphs[index]):
            footer = index
        lines_after += paragraphs[index].count("\n")
        if lines_after > LONGEST_APPENDIX:
            break
    return footer


# ---------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A book of the catalogue."""

    title: str
    author: str
    is_core: bool  # downloaded by default


def make_entry(row: dict[str, str]) -> Entry:
    return Entry(row["title"], row["author"], is_core=row["core"] == "1")


def read_catalogue() -> dict[int, Entry]:
    """Return the books of the catalogue by number."""
    try:
        with open(CATALOGUE, encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file, restval="")
            return {int(row["id"]): make_entry(row) for row in rows}
    except (KeyError, ValueError, csv.Error) as error:
        raise DownloadError(
            f"{CATALOGUE} is damaged ({error!r}); restore it with: git checkout data/catalogue.csv"
        ) from error


def numbers_in(folder: Path) -> set[int]:
    """Return the numbers of the books that are already in a folder."""
    names = [path.name for path in folder.glob("*-*.txt")]
    return {int(name.split("-")[0]) for name in names if re.match("[0-9]{1,9}-", name)}


def file_name(number: int, title: str) -> str:
    """Return a name of ASCII letters, digits and hyphens, whatever the title contains."""
    decomposed = unicodedata.normalize("NFKD", title)
    without_accents = re.sub(r"[\u0300-\u036f]", "", decomposed)
    words = re.findall(r"[a-z0-9]+", without_accents.lower())
    slug = "-".join(words)[:60].rstrip("-")
    return f"{number}-{slug or 'untitled'}.txt"


def save_book(path: Path, text: str) -> None:
    """Write a file such that its name never refers to an incomplete one."""
    temporary = path.parent / f".{path.name}.{os.getpid()}.part"
    try:
        with open(temporary, "wb") as file:
            file.write(text.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_old_temporaries(folder: Path) -> None:
    """Remove what a killed run has left, but not what another run is writing now."""
    for temporary in folder.glob(".*.part"):
        with suppress(FileNotFoundError):  # the other run has given it its name meanwhile
            if time.time() - temporary.stat().st_mtime > OLDEST_TEMPORARY:
                temporary.unlink()


# ---------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------


def report(line: str) -> None:
    """Print a line on standard error without breaking the progress bar."""
    # What a server sends may contain control characters, which a terminal would obey.
    printable = "".join(char if char.isprintable() else "?" for char in line)
    tqdm.write(printable, file=sys.stderr)


def download(books: dict[int, str], args: argparse.Namespace) -> None:
    """Download books, given as numbers with titles. An empty title means the one in the file."""
    session = requests.Session()
    session.headers["User-Agent"] = f"scifi-gpt-download (python-requests/{requests.__version__})"
    args.output.mkdir(parents=True, exist_ok=True)
    remove_old_temporaries(args.output)

    tried = 0
    failures: list[BookError] = []
    in_a_row = 0  # failures because of the server or the connection to it
    # Without a terminal there is no progress bar, but a line for each book.
    with tqdm(total=len(books), unit="book", dynamic_ncols=True, disable=None) as progress:
        for number, title in books.items():
            if tried > 0:
                time.sleep(args.pause)
            tried += 1
            try:
                name = download_book(session, number, title, args)
            except BookError as error:
                report(f"{number}: {error}")
                failures.append(error)
                in_a_row = in_a_row + 1 if error.kind else 0
                if error.kind and in_a_row >= PATIENCE[error.kind][0]:
                    break
            else:
                in_a_row = 0
                if progress.disable:
                    report(f"{tried} of {len(books)}: {name}")
            progress.update()

    if failures:
        raise DownloadError(failure_message(failures, tried, len(books), args.mirror))


def download_book(
    session: requests.Session, number: int, title: str, args: argparse.Namespace
) -> str:
    """Download one book and return the name of its file."""
    url = f"{args.mirror}/cache/epub/{number}/pg{number}.txt"
    body = fetch(session, url, args.timeout, args.pause)
    title_in_file, book = find_book(decode(body))
    name = file_name(number, title or title_in_file)
    save_book(args.output / name, book)
    return name


def failure_message(failures: list[BookError], tried: int, wanted: int, mirror: str) -> str:
    again = "Run the same command again to download what is missing"
    message = f"{len(failures)} of {wanted} books failed"
    if tried < wanted:
        message = f"gave up: {message}, {wanted - tried} were not tried"

    kind = failures[-1].kind
    server_is_the_cause = tried < wanted or len(failures) == wanted
    if kind is None or not server_is_the_cause:
        return f"{message}. {again}."

    other = SECOND_MIRROR if mirror != SECOND_MIRROR else MIRROR
    return (
        f"{message}. The cause: {PATIENCE[kind][1]}. {again}, or try another server with "
        f"--mirror {other}. python train.py works without the books, on data/sample.txt."
    )


def print_list(catalogue: dict[int, Entry], word: str, present: set[int]) -> None:
    """Print the books whose title or author contains a word."""
    lines = [f"{'number':>6}  {'title':48}  {'author':30}  core  here"]
    for number, (title, author, is_core) in catalogue.items():
        if word.casefold() in f"{title}\n{author}".casefold():
            core = "core" if is_core else ""
            here = "here" if number in present else ""
            lines.append(f"{number:6}  {title:48.48}  {author:30.30}  {core:4}  {here}".rstrip())
    print_result("\n".join(lines))


def print_result(text: str) -> None:
    """Print on standard output, which may be a pipe that its reader closes early."""
    if sys.stdout is None:
        raise DownloadError("standard output is closed")
    try:
        # The console of Windows may lack some characters.
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")
        print(text, flush=True)
    except OSError as error:
        # Python writes the rest when it ends. Let it go nowhere, without another error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise DownloadError(f"standard output: {error.strerror}") from error


# ---------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------


def book_number(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not the number of a book, such as 35")
    return int(text)


def server_address(text: str) -> str:
    try:
        parts = urlsplit(text)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        is_valid = False
    if not is_valid:
        raise argparse.ArgumentTypeError(f"{text!r} does not look like https://...")
    return text.rstrip("/")


def folder_path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("the name of the folder is empty")
    return Path(os.path.expanduser(text))


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to 3600")
    return value


def parse_arguments() -> argparse.Namespace:
    ids_help = "the numbers of the books to download (default: the core of the catalogue)"
    list_help = "download nothing; print the catalogue, or the books with WORD in title or author"
    mirror_help = f"the server (default: {MIRROR}; another one: {SECOND_MIRROR})"
    output_help = "the folder for the books (default: data/books)"
    pause_help = f"seconds between two requests (default: {PAUSE:g}, as Project Gutenberg asks)"
    timeout_help = f"seconds to wait for a silent server (default: {TIMEOUT:g})"

    parser = argparse.ArgumentParser(
        usage="%(prog)s [options] [ID ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("ids", nargs="*", type=book_number, metavar="ID", help=ids_help)
    add("--all", action="store_true", help="download the whole catalogue")
    add("--list", nargs="?", const="", metavar="WORD", help=list_help)
    add("--mirror", type=server_address, default=MIRROR, metavar="URL", help=mirror_help)
    add("--output", type=folder_path, default=BOOKS, metavar="DIR", help=output_help)
    add("--pause", type=seconds, default=PAUSE, metavar="S", help=pause_help)
    add("--timeout", type=seconds, default=TIMEOUT, metavar="S", help=timeout_help)

    args = parser.parse_args()
    if args.timeout == 0:
        parser.error("argument --timeout: must be more than 0 seconds")
    return args


def run(args: argparse.Namespace) -> None:
    catalogue = read_catalogue()
    present = numbers_in(args.output)
    if args.list is not None:
        print_list(catalogue, args.list, present)
        return

    wanted = list(args.ids)
    for number, entry in catalogue.items():
        if args.all or (entry.is_core and not args.ids):
            wanted.append(number)
    wanted = list(dict.fromkeys(wanted))  # without repetitions

    missing = {}
    for number in wanted:
        if number not in present:
            missing[number] = catalogue[number].title if number in catalogue else ""
    if missing:
        download(missing, args)
    already_there = len(wanted) - len(missing)
    report(f"books downloaded to {args.output}: {len(missing)}; already there: {already_there}")
    report("Next: bash bin/concatenate.sh")


def main() -> None:
    args = parse_arguments()
    try:
        run(args)
    except DownloadError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error.filename or args.output}: {error.strerror or error}")
    except KeyboardInterrupt:
        report("stopped; run the same command again to download the rest")
        sys.exit(130)


if __name__ == "__main__":
    main()
