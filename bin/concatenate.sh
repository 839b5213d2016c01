#!/usr/bin/env bash
#
# Join the books of a folder into one text, with a blank line between two books:
#
#     bash bin/concatenate.sh [BOOKS_DIR [OUTPUT_FILE]]
#
# The default is data/books into data/scifi.txt. Runs on bash 3.2 with the tools of macOS too.

set -euo pipefail
shopt -s nocaseglob # *.txt matches B.TXT too
export LC_ALL=C     # the same order everywhere; the tools treat text as bytes

data=$(CDPATH='' cd "$(dirname "$0")/../data" && pwd)
folder=${1:-$data/books}
[[ $folder == /* ]] || folder=./$folder # otherwise awk takes a=b/c.txt as an assignment
output=${2:-$data/scifi.txt}

if [ -d "$output" ]; then
    echo "error: $output is a folder: name a file in it" >&2
    exit 1
fi

# Books are in the order of the numbers that their names begin with (none counts as 0), and then
# of their names.
books=()
while IFS= read -r name; do
    book=$folder/$name
    if [ ! -f "$book" ]; then
        continue # no text matches *.txt
    fi
    if [ "$book" -ef "$output" ]; then
        echo "error: $output would replace one of the books: name another output" >&2
        exit 1
    fi

    # Nothing is converted here, because a wrong guess of an encoding destroys a text.
    if ! iconv -f UTF-8 -t UTF-8 <"$book" >/dev/null 2>&1; then
        quoted=$(printf '%q' "$book")
        echo "error: $book is not UTF-8. Find out its encoding (a text editor shows it), and" \
            "convert it: iconv -f ENCODING -t UTF-8 $quoted > $quoted.utf8" \
            "(if that reads well, put it in the book's place)" >&2
        exit 1
    fi
    books+=("$book")
done < <(basename -a "$folder"/*.txt | sort -n)

if [ ${#books[@]} -eq 0 ]; then
    echo "error: there are no books in $folder; run python bin/download.py first" \
        "(python train.py works without them, on data/sample.txt)" >&2
    exit 1
fi

# The output gets its name only when it is complete.
temporary=$output.$$.part
trap 'rm -f "$temporary"' EXIT
awk '
    FNR == 1 && NR > 1 { print "" }  # the blank line between two books
    {
        gsub(/\357\273\277/, "")  # byte order marks
        sub(/\r+$/, "")  # what Windows adds to a line end
        gsub(/\r/, "\n")  # the line ends of old Macs
        print  # with the line end that the last line of a book may lack
    }
' "${books[@]}" >"$temporary"
mv -f "$temporary" "$output"

printf '%s: %d book(s)\nnext: python train.py --data %q\n' "$output" ${#books[@]} "$output" >&2
