#!/usr/bin/env bash
#
# Join the books in data/books into one text, data/scifi.txt, with a blank line between two books.
# Downloaded books come first, by number. Texts of your own follow, by name.
#
# Runs on bash 3.2 with the tools of macOS as well as on Linux.

set -euo pipefail
export LC_ALL=C # Tools treat text as bytes, and sort it in the same order everywhere.

usage='usage: bash bin/concatenate.sh [BOOKS_DIR [OUTPUT_FILE]]'

# fail STATUS MESSAGE
fail() {
    printf 'error: %s\n' "$2" >&2
    exit "$1"
}

# Set the array `books` to the files to join.
find_books() {
    local book name
    local numbered=()
    local own=()
    books=()

    for book in "$folder"/*.txt; do
        # Skip subfolders, and an earlier result that was written among the books.
        if [ ! -f "$book" ] || [ "$book" -ef "$output" ]; then
            continue
        fi
        name=${book##*/}
        if [[ $name =~ ^[0-9]+- ]]; then
            numbered+=("$name")
        else
            own+=("$book")
        fi
    done

    # bash 3.2 rejects "${array[@]}" of an empty array.
    if [ ${#numbered[@]} -gt 0 ]; then
        while IFS= read -r name; do
            books+=("$folder/$name")
        done < <(printf '%s\n' "${numbered[@]}" | sort -n)
    fi
    if [ ${#own[@]} -gt 0 ]; then
        books+=("${own[@]}")
    fi
}

# Refuse a book that is not UTF-8, and tell how to convert it.
check_encoding() {
    local book=$1
    local start nul_bytes encoding quoted converted

    [ -r "$book" ] || fail 1 "$book cannot be read"
    start=$(od -An -tx1 -N4 "$book" | tr -d ' \n')
    nul_bytes=$(tr -cd '\000' <"$book" | wc -c)
    # UTF-16 without a byte order mark can be valid UTF-8 with many NUL bytes.
    if [ "$nul_bytes" -eq 0 ] && iconv -f UTF-8 -t UTF-8 "$book" >/dev/null 2>&1; then
        return
    fi

    # Guess the encoding from the first bytes.
    case $start in
        fffe0000 | 0000feff) encoding=UTF-32 ;;
        fffe* | feff*) encoding=UTF-16 ;;
        00*) encoding=UTF-16BE ;;
        *) encoding=WINDOWS-1252 ;;
    esac
    if [ "$encoding" = WINDOWS-1252 ] && [ "$nul_bytes" -gt 0 ]; then
        encoding=UTF-16LE
    fi
    quoted=$(printf '%q' "$book")
    converted=$(printf '%q' "$book.utf8")
    fail 1 "$book is not UTF-8. It looks like $encoding; if it is, convert it with: \
iconv -f $encoding -t UTF-8 $quoted > $converted && mv $converted $quoted"
}

# Print a book in UTF-8 without byte order marks, with every line ended by a line feed.
print_book() {
    local byte_order_mark=$'\xef\xbb\xbf'
    local carriage_return=$'\r'

    # The carriage returns that remain after sed are line ends of their own, as on an old Mac.
    # awk adds the line feed that the last line may lack.
    sed -e "s/$byte_order_mark//g" -e "s/$carriage_return*\$//" <"$1" | tr '\r' '\n' | awk 1
}

print_all_books() {
    local book
    local is_first=yes

    for book in "${books[@]}"; do
        if [ "$is_first" = no ]; then
            echo || return
        fi
        is_first=no
        print_book "$book" || return
    done
}

# ---- Arguments

if [ "${1-}" = -h ] || [ "${1-}" = --help ]; then
    printf '%s\n' "$usage"
    printf 'Join BOOKS_DIR/*.txt (default: data/books) into OUTPUT_FILE (default: data/scifi.txt).\n'
    exit
fi
[ $# -le 2 ] || fail 2 "$# arguments are too many; $usage"

data=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)/data
folder=${1-$data/books}
output=${2-$data/scifi.txt}
if [ -z "$folder" ] || [ -z "$output" ]; then
    fail 2 "the name of a file or folder is empty; $usage"
fi

# With ./ in front, no tool takes a name such as -n for an option.
case $folder in /*) ;; *) folder=./$folder ;; esac
case $output in /*) ;; *) output=./$output ;; esac

# ---- Checks, before anything is written

if [ -e "$output" ] && [ ! -f "$output" ]; then
    fail 1 "$output is not a file; name the file to write"
fi
[ -d "$(dirname "$output")" ] || fail 1 "the folder of $output does not exist; create it first"
command -v iconv >/dev/null || fail 1 "the program iconv is missing; install it first"

shopt -s nullglob
find_books
if [ ${#books[@]} -eq 0 ]; then
    fail 1 "there are no books in $folder; run python bin/download.py first. \
(python train.py works without them, on the bundled data/sample.txt.)"
fi
for book in "${books[@]}"; do
    check_encoding "$book"
done

# ---- Join the books into a temporary file, and give it its name when it is complete

temporary=$output.$$.part
trap 'rm -f -- "$temporary"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

if ! { print_all_books >"$temporary"; } 2>/dev/null; then
    fail 1 "cannot write $temporary: is the disk full, or its folder write-protected?"
fi
if ! mv -f -- "$temporary" "$output" 2>/dev/null; then
    fail 1 "cannot replace $output: is its folder write-protected?"
fi

bytes=$(wc -c <"$output")
printf '%s: %d books, %d bytes\n' "$output" "${#books[@]}" "$bytes" >&2
printf 'Next: python train.py\n' >&2
