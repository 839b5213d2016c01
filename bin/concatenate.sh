#!/usr/bin/env bash
#
# Join the books of a folder into one text, with a blank line between two books:
#
#     bash bin/concatenate.sh [BOOKS_DIR [OUTPUT_FILE]]
#
# The default is data/books into data/scifi.txt. Runs on bash 3.2 with the tools of macOS too.

set -euo pipefail
shopt -s nullglob nocaseglob # *.txt matches B.TXT too, and is left out where it matches nothing
export LC_ALL=C              # the same order everywhere; the tools treat text as bytes
unset CDPATH                 # cd goes to the folder that is named, and prints nothing

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 1
}

if [ $# -gt 2 ] || [[ ${1-} == -* ]]; then
    echo 'usage: bash bin/concatenate.sh [BOOKS_DIR [OUTPUT_FILE]]' >&2
    exit 2
fi
data=$(cd "$(dirname "$0")/../data" && pwd)
folder=${1:-$data/books}
output=${2:-$data/scifi.txt}
# With ./ in front, awk does not take the name x=1/a.txt for an assignment.
if [[ $folder != /* ]]; then
    folder=./$folder
fi
if [ -d "$output" ]; then
    fail "$output is a folder; name the file to write"
fi

# Downloaded books come first, by number. Texts of your own follow, by name.
books=()
while IFS= read -r name; do
    book=$folder/$name
    if [ -f "$book" ] && [ ! "$book" -ef "$output" ]; then
        books+=("$book")
    fi
done < <(
    cd "$folder" 2>/dev/null || exit
    printf '%s\n' [0-9]*.txt | sort -n
    printf '%s\n' [!0-9]*.txt
)

if [ ${#books[@]} -eq 0 ]; then
    fail "there are no books in $folder; run python bin/download.py first \
(python train.py works without them, on data/sample.txt)"
fi

# Nothing is converted here, because a wrong guess of an encoding destroys a text.
for book in "${books[@]}"; do
    nul_bytes=$(tr -cd '\000' <"$book" | wc -c)
    if [ "$nul_bytes" -gt 0 ]; then
        fail "$book has NUL bytes: it is not text, or it is UTF-16; convert or remove it"
    fi
    if ! iconv -f UTF-8 -t UTF-8 <"$book" >/dev/null 2>&1; then
        quoted=$(printf '%q' "$book")
        fail "$book is not UTF-8. Find out its encoding (a text editor shows it), and convert it: \
iconv -f ENCODING -t UTF-8 $quoted > $quoted.utf8 (if that reads well, put it in the book's place)"
    fi
done

# The output gets its name only when it is complete.
temporary=$output.part
trap 'rm -f -- "$temporary"' EXIT
awk '
    FNR == 1 && NR > 1 { print "" }  # the blank line between two books
    {
        gsub(/\357\273\277/, "")  # byte order marks
        sub(/\r+$/, "")           # Windows ends a line with \r\n,
        gsub(/\r/, "\n")          # an old Mac with \r
        print                     # with the line end that a last line may lack
    }
' "${books[@]}" >"$temporary"
mv -f -- "$temporary" "$output"

printf '%s: %d books, %d bytes\n' "$output" ${#books[@]} "$(wc -c <"$output")" >&2
next='python train.py'
if [ $# -eq 2 ]; then
    next="$next --data $(printf '%q' "$output")"
fi
printf 'next: %s\n' "$next" >&2
