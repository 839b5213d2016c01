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
from pathlib import Path

import requests

ROOT = Path(__file__).resolve().parent.parent
CATALOGUE = ROOT / "data/catalogue.csv"
BOOKS = ROOT / "data/books"

# The website www.gutenberg.org is for people, and asks programs to use a mirror.
MIRROR = "https://gutenberg.pglaf.org"
SECOND_MIRROR = "https://aleph.pglaf.org"
HEADERS = {"User-Agent": f"scifi-gpt-download (requests/{requests.__version__})"}
PAUSE = 2.0  # seconds between two requests, as Project Gutenberg asks of programs
TIMEOUT = 30  # seconds without an answer, after which a request has failed
PATIENCE = 5  # failures in a row that end the run


class DownloadError(Exception):
    """A message for the user: what went wrong, and what to do."""


# ---- From the bytes of a file to the text of a book ------------------------------------


def decode(data: bytes) -> str:
    """Returns the text of a file, with LF line ends."""
    # Text in another encoding is practically never valid UTF-8. Windows-1252 has the printable
    # characters of ASCII and Latin-1, which Project Gutenberg's older files use.
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("cp1252")
    return re.sub(r"\r\n?", "\n", text)


# "*** START OF THE PROJECT GUTENBERG EBOOK THE TIME MACHINE ***". A long title continues on
# the next lines, up to the closing stars. A few files have an old start marker right after the
# new one: the .* at the beginning takes as much as it can, and so finds the last one.
START = r"\*{3} ?START OF TH(?:E|IS) PROJECT GUTENBERG.{0,300}?\*{3}"
END = r"\*{3} ?END OF TH(?:E|IS) PROJECT GUTENBERG"
BOOK = re.compile(f".*{START}(.*?){END}", re.DOTALL)

# What volunteers write into a book, in paragraphs of their own. At the beginning they say who
# made the file: "Produced by Andrew Sly", "This Project Gutenberg Etext was prepared by ..."
CREDITS = re.compile(
    r"""\A (?: \s*
        (?: Produced\ by | E-?text\ prepared\ by
        | This\ (?:Project\ Gutenberg\ )?E-?(?:text|book)\ was ) \b
        .*? \n\s*\n
    )+""",
    re.VERBOSE | re.DOTALL | re.IGNORECASE,
)

# A note in brackets, which may have several paragraphs: "[Transcriber's Note: ...]"
BRACKETED_NOTE = re.compile(
    r"(?<!\S\n)^ *\[Transcriber\S{0,3} Notes?\b[^\[\]]*\](?:\n\s*\n|\s*\Z)",
    re.MULTILINE | re.IGNORECASE,
)

# A note without brackets, perhaps in a frame of + - | or *: it extends to the end of the book if
# that is at most 2,000 characters away, and is otherwise one paragraph.
NOTE = re.compile(
    r"""(?<!\S\n) ^ [+|*=_\ -]* \n? [|_\ ]* Transcriber\S{0,3}\ Notes?\b \W*
    (?: .{0,2000} \Z | .*? (?: \n\s*\n | \s*\Z ) )""",
    re.VERBOSE | re.DOTALL | re.MULTILINE | re.IGNORECASE,
)

# At the end: "End of Project Gutenberg's The Time Machine, by H. G. Wells"
FOOTER = re.compile(
    r"^[ *]*(?:The )?End (?:of )?(?:the |this )?Project Gutenberg.{0,300}\Z",
    re.DOTALL | re.MULTILINE | re.IGNORECASE,
)


def extract_book(text: str) -> str:
    """Returns the text between the markers of a file, without what volunteers added to it."""
    match = BOOK.match(text)
    if match is None:
        raise DownloadError("it has no START and END markers: not a book, or cut short")

    book = FOOTER.sub("", match[1])
    book = BRACKETED_NOTE.sub("", book)
    book = NOTE.sub("", book.rstrip())
    book = CREDITS.sub("", book)

    # The first line keeps its indentation.
    return book.lstrip("\n").rstrip() + "\n"


# ---- The catalogue ---------------------------------------------------------------------


def read_catalogue() -> dict[int, dict[str, str]]:
    """Returns the rows of the catalogue (title, author, core) by number."""
    with open(CATALOGUE, encoding="utf-8", newline="") as file:
        return {int(row["id"]): row for row in csv.DictReader(file)}


def print_list(catalogue: dict[int, dict[str, str]], word: str) -> None:
    """Prints the books of the catalogue whose title or author contains a word."""
    for number, row in catalogue.items():
        title = row["title"]
        author = row["author"]
        if word.casefold() in f"{title} {author}".casefold():
            core = "core" if row["core"] == "1" else ""
            print(f"{number:6}  {title:48.48}  {author:30.30}  {core}")


def file_name(number: int, title: str) -> str:
    """Returns, for example, "35-the-time-machine.txt"."""
    words = re.findall(r"\w+", title.lower())
    return "-".join([str(number), *words])[:60] + ".txt"


# ---- The run ---------------------------------------------------------------------------

GIVE_UP = (
    f"gave up after {PATIENCE} failures in a row. Run the same command again, perhaps with "
    f"another --mirror: {MIRROR} or {SECOND_MIRROR}. "
    "Training works without the books: python train.py uses data/sample.txt."
)


def download(names: dict[int, str], mirror: str, folder: Path) -> int:
    """Downloads books and returns how many failed. `names` has a file name for each number."""
    failed = 0
    failed_in_a_row = 0
    folder.mkdir(parents=True, exist_ok=True)

    for position, (number, name) in enumerate(names.items(), start=1):
        time.sleep(PAUSE)  # before the first request too: another run may have ended just now
        try:
            url = f"{mirror}/cache/epub/{number}/pg{number}.txt"
            response = requests.get(url, headers=HEADERS, timeout=TIMEOUT)
            response.raise_for_status()
            book = extract_book(decode(response.content))
        except (requests.RequestException, UnicodeDecodeError, DownloadError) as error:
            print(f"{number}: {error}", file=sys.stderr)
            failed += 1
            failed_in_a_row += 1
            if failed_in_a_row == PATIENCE:
                raise DownloadError(GIVE_UP) from error
            continue

        failed_in_a_row = 0
        temporary = folder / f"{name}.part"
        temporary.write_text(book, encoding="utf-8", newline="\n")
        temporary.replace(folder / name)
        print(f"{position} of {len(names)}: {name}", file=sys.stderr)

    return failed


# ---- The command line ------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    list_help = "download nothing; list the books with WORD in title or author, or all"
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

    names = {}  # of those that are not there yet
    for number in wanted:
        row = catalogue.get(number, {"title": ""})  # not all books are in the catalogue
        name = file_name(number, row["title"])
        if not (args.output / name).exists():
            names[number] = name

    failed = download(names, args.mirror.rstrip("/"), args.output)
    if failed:
        raise DownloadError(f"{failed} of {len(names)} book(s) failed; run the command again")
    print(f"{len(names)} book(s) downloaded to {args.output}", file=sys.stderr)

    command = "bash bin/concatenate.sh"
    if args.output != BOOKS:
        command += f" {shlex.quote(str(args.output))}"
    print(f"next: {command}", file=sys.stderr)


def main() -> None:
    args = parse_arguments()
    # In a file, Windows would use a code page that lacks characters of the catalogue. The output
    # of a notebook is of another type.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")

    try:
        run(args)
    except KeyboardInterrupt:
        sys.exit("stopped; run the same command again to download the rest")
    except BrokenPipeError:  # from head, for example, which reads only the beginning of the list
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
    except (DownloadError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
