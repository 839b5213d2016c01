"""Download science fiction from Project Gutenberg into data/books, one text file per book.

    python bin/download.py                  the core of the catalogue
    python bin/download.py --list wells     what the catalogue has by or about Wells
    python bin/download.py 35 36            two books, by their numbers

A file gets its name only when it is complete, and a book that is already there is not
downloaded again. After an interruption, run the same command again.
"""

import argparse
import csv
import io
import os
import re
import shlex
import sys
import time
import unicodedata
from pathlib import Path

import requests
from requests.adapters import HTTPAdapter
from requests.exceptions import InvalidSchema, InvalidURL, MissingSchema
from tqdm import tqdm
from urllib3.util import Retry

ROOT = Path(__file__).resolve().parent.parent
CATALOGUE = ROOT / "data/catalogue.csv"
BOOKS = ROOT / "data/books"

# The website www.gutenberg.org is for people, and asks programs to use a mirror.
MIRROR = "https://gutenberg.pglaf.org"
SECOND_MIRROR = "https://aleph.pglaf.org"
PAUSE = 2.0  # seconds between two requests, as Project Gutenberg asks of programs
TIMEOUT = 30  # seconds without an answer, after which a request has failed
PATIENCE = 5  # failures in a row, after which the run ends


class BookError(Exception):
    """Why one book cannot be downloaded. The run goes on with the next one."""


class DownloadError(Exception):
    """Why the run ends, and what the user can do."""


# ---- From the server to the bytes of a file


def make_session() -> requests.Session:
    # A server that cannot be reached is tried again with the next book, hence connect=0.
    # raise_on_status=False: after the last attempt, raise_for_status names the status.
    retry = Retry(
        total=2,
        connect=0,
        backoff_factor=PAUSE,
        status_forcelist=(429, 500, 502, 503, 504),
        raise_on_status=False,
    )
    session = requests.Session()
    session.mount("http://", HTTPAdapter(max_retries=retry))
    session.mount("https://", HTTPAdapter(max_retries=retry))
    session.headers["User-Agent"] = f"scifi-gpt-download (requests/{requests.__version__})"
    return session


def fetch(session: requests.Session, url: str) -> bytes:
    try:
        response = session.get(url, timeout=TIMEOUT)
        response.raise_for_status()
    except (InvalidSchema, InvalidURL, MissingSchema) as error:
        # The address of the server or of a proxy is wrong, so every book would fail.
        hint = "check --mirror, HTTPS_PROXY, HTTP_PROXY and ALL_PROXY"
        raise DownloadError(f"{error} ({hint})") from error
    except requests.RequestException as error:
        raise BookError(short_reason(error)) from error
    return response.content


def short_reason(error: requests.RequestException) -> str:
    """Return, for example, "ProxyError: [Errno 111] Connection refused"."""
    # requests and urllib3 wrap the error that says what happened in others that say less.
    cause = error
    while cause.__context__ is not None:
        cause = cause.__context__

    # "404 Client Error: Not Found for url: https://..."
    message = str(cause).split(" for url: ")[0]
    return f"{type(error).__name__}: {message}"


# ---- From the bytes of a file to the text of a book


def decode(data: bytes) -> str:
    """Return the text of a file in Unicode's composed form (NFC), with LF line ends."""
    # Text in another encoding is practically never valid UTF-8. Windows-1252 has the printable
    # characters of ASCII and Latin-1, which Project Gutenberg's older files use.
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        try:
            text = data.decode("cp1252")
        except UnicodeDecodeError as error:
            raise BookError("it is neither UTF-8 nor Windows-1252") from error

    text = text.replace("\ufeff", "")  # byte order marks
    text = re.sub(r"\r*\n|\r", "\n", text)
    return unicodedata.normalize("NFC", text)


# "*** START OF THE PROJECT GUTENBERG EBOOK THE TIME MACHINE ***". A long title continues on
# the next lines, up to the closing stars.
MARKER = r"^ *\*{3} ?%s OF TH(?:E|IS) PROJECT GUTENBERG"
START = re.compile(MARKER % "START" + r".*?(?:\n.+?){0,2}?\*{3} *$", re.MULTILINE)
END = re.compile(MARKER % "END", re.MULTILINE)
TITLE = re.compile(r"^Title:(.*)", re.MULTILINE)


def extract_book(text: str) -> tuple[str, str]:
    """Return the title in the header of a file, and the text between its markers."""
    # A few files have an old start marker right after the new one. The last one counts.
    header, *after_start = START.split(text)
    end = END.search(after_start[-1]) if after_start else None
    if end is None:
        raise BookError("it has no START and END markers: not a book, or cut short")

    title = TITLE.search(header)
    book = after_start[-1][: end.start()]
    return title[1] if title else "", remove_notes(book)


# Volunteers leave text of their own at the edges of a book. CREDITS, NOTE and FOOTER match
# whole paragraphs that look like nothing else. When in doubt, a paragraph stays.
EDGE = 5000  # characters from the beginning or the end of a book
REST = r"(?:(?!\n\s*\n).){0,2000}"  # the rest of a paragraph
PARAGRAPH_END = r"(?:\n\s*\n|\s*\Z)"  # with the blank lines after it

CREDITS = re.compile(
    rf"""\A\s* (?:
        # "Produced by Greg Weeks and the Online Distributed Proofreading Team at ...",
        # "E-text prepared by ...", "This Project Gutenberg Etext was prepared by ..."
        (?= {REST} (?i: proofread | e-?text | e-?book | Project\sGutenberg | HTML) )
        (?: Produced | E-?text\sprepared | This\s.{{0,20}}(?i:text|book)\swas\s\w+ ) \sby\b
        {REST}
        # "Produced by Andrew Sly", nothing but names
        | Produced\sby (?: [,;]?\s (?: [A-Z][\w.'-]* | and ) )+
    ) {PARAGRAPH_END}""",
    re.VERBOSE | re.DOTALL,
)

NOTE_HEADING = r"Transcriber\S{0,3}\sNotes?\b"
NOTE_WORD = r"""(?: e-?text | e-?book | Project\sGutenberg | copyright | spelling | italic
    | punctuation | hyphenat | typographical | correct(?:ed|ions) | chang(?:es|ed)\sto )"""
# A paragraph with such a word. An atomic group, (?>...), keeps failing searches fast.
NOTE_PARAGRAPH = rf"(?> (?={REST}{NOTE_WORD}) {REST} {PARAGRAPH_END} )"
NOTE = re.compile(
    rf"""(?<!\S\n) ^ (?:
        # "[Transcriber's Note: ...]", perhaps with several paragraphs
        [ ]* \[ \s* {NOTE_HEADING} (?= [^\[\]]{{0,2000}} {NOTE_WORD} ) [^\[\]]{{0,2000}} \]
        {PARAGRAPH_END}
        # without brackets, perhaps in a frame: a paragraph, or a heading with a paragraph,
        | [+|*=_\ -]* \n? [|_\ ]* {NOTE_HEADING} [\W_]* {NOTE_PARAGRAPH}
        # and at the end of the book all that follows, if all of it is about the file
        (?: {NOTE_PARAGRAPH}+ \Z )?
    )""",
    re.VERBOSE | re.DOTALL | re.MULTILINE | re.IGNORECASE,
)

# "End of Project Gutenberg's The Time Machine", "End of the Project Gutenberg EBook of ..."
FOOTER = re.compile(
    r"^[ *]*(?:The )?End (?:of )?(?:the |this )?Project Gutenberg(?:\Ws| e-?text| e-?book)\b"
    r".{0,300}\Z",
    re.DOTALL | re.MULTILINE | re.IGNORECASE,
)


def remove_notes(book: str) -> str:
    """Return the text between the markers without what volunteers added at its edges."""

    def keep_in_the_middle(note: re.Match) -> str:
        is_at_an_edge = note.start() < EDGE or note.end() > len(note.string) - EDGE
        return "" if is_at_an_edge else note[0]

    book = FOOTER.sub("", book.rstrip())
    book = NOTE.sub(keep_in_the_middle, book)
    book = CREDITS.sub("", book)

    # The first line keeps its indentation.
    return re.sub(r"\A\s*\n", "", book).rstrip() + "\n"


# ---- Files


def read_catalogue() -> dict[int, dict[str, str]]:
    """Return the rows of the catalogue (title, author, core) by number."""
    with open(CATALOGUE, encoding="utf-8", newline="") as file:
        return {int(row["id"]): row for row in csv.DictReader(file)}


def file_name(number: int, title: str) -> str:
    """Return, for example, "35-the-time-machine.txt"."""
    decomposed = unicodedata.normalize("NFKD", title)
    without_accents = re.sub(r"[\u0300-\u036f]", "", decomposed)
    words = re.findall(r"[a-z0-9]+", without_accents.lower())
    slug = "-".join(words)[:60].rstrip("-")
    return f"{number}-{slug or 'untitled'}.txt"


def save_book(path: Path, text: str) -> None:
    """Write a file such that its name never refers to an incomplete one."""
    temporary = path.with_suffix(".part")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, path)


# ---- The run

GIVE_UP = (
    f"gave up after {PATIENCE} failures in a row, the last one: {{reason}}. Run the same "
    f"command again, perhaps with another --mirror: {MIRROR} or {SECOND_MIRROR}. "
    "Training works without the books: python train.py uses data/sample.txt."
)


def download(books: dict[int, str], mirror: str, folder: Path) -> int:
    """Download books, given as titles by number, and return how many failed."""
    failed = 0
    failed_in_a_row = 0
    folder.mkdir(parents=True, exist_ok=True)

    # disable=None shows the bar only on a terminal. Elsewhere each book gets a line.
    bar = tqdm(total=len(books), unit="book", disable=None)
    with make_session() as session, bar:
        for position, (number, title) in enumerate(books.items(), start=1):
            if position > 1:
                time.sleep(PAUSE)

            try:
                data = fetch(session, f"{mirror}/cache/epub/{number}/pg{number}.txt")
                title_in_file, book = extract_book(decode(data))
            except BookError as error:
                tqdm.write(f"{number}: {error}", file=sys.stderr)
                failed += 1
                failed_in_a_row += 1
                if failed_in_a_row == PATIENCE:
                    raise DownloadError(GIVE_UP.format(reason=error)) from error
            else:
                name = file_name(number, title or title_in_file)
                save_book(folder / name, book)
                failed_in_a_row = 0
                if bar.disable:
                    print(f"{position} of {len(books)}: {name}", file=sys.stderr)
            bar.update()

    return failed


def print_list(catalogue: dict[int, dict[str, str]], word: str) -> None:
    """Print the books of the catalogue whose title or author contains a word."""
    print(f"{'number':>6}  {'title':48}  {'author':30}  core")
    for number, row in catalogue.items():
        title = row["title"]
        author = row["author"]
        if word.casefold() in f"{title} {author}".casefold():
            core = "core" if row["core"] == "1" else ""
            print(f"{number:6}  {title:48.48}  {author:30.30}  {core}".rstrip())


# ---- The command line


def parse_arguments() -> argparse.Namespace:
    list_help = "download nothing; print the catalogue, or the books with WORD in title or author"
    mirror_help = f"the server (default: {MIRROR}; another one: {SECOND_MIRROR})"

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("ids", nargs="*", type=int, metavar="ID", help="numbers of books (default: the core)")
    add("--all", action="store_true", help="download the whole catalogue")
    add("--list", nargs="?", const="", metavar="WORD", help=list_help)
    add("--mirror", default=MIRROR, metavar="URL", help=mirror_help)
    add("--output", type=Path, default=BOOKS, metavar="DIR", help="(default: data/books)")
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    catalogue = read_catalogue()
    if args.list is not None:
        print_list(catalogue, args.list)
        return

    core = [number for number, row in catalogue.items() if row["core"] == "1"]
    wanted = args.ids or core
    if args.all:
        wanted = [*args.ids, *catalogue]

    # Books that the catalogue lacks get their titles from their files.
    titles = {number: row["title"] for number, row in catalogue.items()}
    books = {number: titles.get(number, "") for number in wanted}

    # A book that is already there is known by the number at the beginning of its name.
    present = {path.name.split("-")[0] for path in args.output.glob("*-*.txt")}
    missing = {number: title for number, title in books.items() if str(number) not in present}

    failed = download(missing, args.mirror.rstrip("/"), args.output)
    print(
        f"{len(missing) - failed} books downloaded to {args.output}, "
        f"{len(books) - len(missing)} were already there",
        file=sys.stderr,
    )
    if failed:
        again = "run the same command again"
        raise DownloadError(f"{failed} of {len(missing)} books failed; {again}")

    command = "bash bin/concatenate.sh"
    if args.output != BOOKS:
        command += f" {shlex.quote(str(args.output))}"
    print(f"next: {command}", file=sys.stderr)


def main() -> None:
    args = parse_arguments()

    # A pipe on Windows has a code page that lacks characters of the catalogue. The standard
    # output of a notebook is of another type, and needs no change.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")

    try:
        run(args)
    except KeyboardInterrupt:
        print("stopped; run the same command again to download the rest", file=sys.stderr)
        sys.exit(130)
    except (DownloadError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
