#!/usr/bin/env bash
# Joins the books into one text, a blank line between: first by their Gutenberg number, then your own by name.
set -eu
export LC_ALL=C # the same order everywhere
usage='usage: bash bin/concatenate.sh [BOOKS_DIR [OUTPUT_FILE]]'

fail() { # status message
  printf 'error: %s\n' "$2" >&2
  exit "$1"
}

join() { # what each book holds, its last line ended
  local book first=yes
  for book in "${books[@]}"; do
    [ $first ] || echo || return
    first=
    cat "$book" || return
    [ -z "$(tail -c 1 <"$book" | tr '\0' '?')" ] || echo || return
  done
}

case ${1-} in -h | --help)
  printf '%s\nJoins BOOKS_DIR/*.txt (data/books) into OUTPUT_FILE (data/scifi.txt).\n' "$usage"
  exit ;;
esac
[ $# -le 2 ] || fail 2 "$# arguments, but at most two are known; $usage"
data=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)/data
folder=${1-$data/books} output=${2-$data/scifi.txt}
if [ -z "$folder" ] || [ -z "$output" ]; then fail 2 "a name is empty; $usage"; fi
case $folder in /*) ;; *) folder=./$folder ;; esac # nothing takes it for an option
case $output in /*) ;; *) output=./$output ;; esac
[ ! -e "$output" ] || [ -f "$output" ] || fail 1 "$output is not a file: name one to write"

shopt -s nullglob
books=() digits=
while [ ${#digits} -lt 45 ]; do # numbers of one digit, of two, up to nine: each kind is sorted by the shell
  digits+='[0-9]'
  # shellcheck disable=SC2231 # a pattern
  for book in "$folder"/$digits-*.txt; do [ ! -f "$book" ] || books+=("$book"); done
done
for book in "$folder"/*.txt; do
  [[ ! -f $book || ${book##*/} =~ ^[0-9]{1,9}- ]] || [ "$book" -ef "$output" ] || books+=("$book")
done
[ ${#books[@]} -gt 0 ] || fail 1 "no books in $folder: run python bin/download.py first"

trap 'rm -f -- "$output.part"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
if ! reason=$({ join >"$output.part"; } 2>&1 && mv -f -- "$output.part" "$output" 2>&1); then
  reason=${reason##*$'\n'}
  reason=${reason#*: line } # in the shell's own words, after which come a number and a colon
  fail 1 "${reason#[0-9]*: }"
fi
printf '%s: %d books, %d bytes\n' "$output" ${#books[@]} "$(wc -c <"$output")" >&2
