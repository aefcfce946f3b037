"""The shell scripts that copy runs in a container: they need `sh` and `tar`, of busybox or GNU."""

from __future__ import annotations

#: The beginning of every script.  Arguments have octal escapes: on the wire they are text, but names are bytes.  A
#: command substitution is a fork, milliseconds in an emulated guest: most names need none.
PROLOGUE = r"""
plain() { case $1 in *\\*) plain=$(printf '%b_' "$1") plain=${plain%_} ;; *) plain=$1 ;; esac; }
fail() { echo "$1" >&2; exit 1; }
plain "$1"; at=$plain; plain "$2"; name=$plain
"""

#: $1 target, $2 name, $3 file, directory or contents, $4 whether a directory was requested, $5 a unique name.
#: Everything is unpacked beside its destination and moved there when complete; existing directories are kept.
PUT = (
    PROLOGUE
    + r"""
if [ -d "$at" ]; then
    parent=$at final=${at%/}/$name
    [ "$3" = contents ] && final=$at
else
    [ "$4" = 1 ] && fail "$at: no such directory"
    [ "$3" = file ] || [ ! -e "$at" ] || fail "$at: not a directory"
    final=$at
    if [ -h "$at" ] && [ -f "$at" ]; then final=$(readlink -f "$at"; echo _) final=${final%?_}; fi
    parent=${final%/*} parent=${parent:-/}
    [ -d "$parent" ] || fail "$parent: no such directory"
    if [ -e "$final" ]; then
        case $final in /proc/*|/sys/*) exec tar -xOf - >"$final" ;; esac
        [ -f "$final" ] || exec tar -xOf - >"$final"
    fi
fi
made=${parent%/}/.caisson-$5
place() {
    if [ -d "$1" ] && [ ! -h "$1" ]; then
        if [ -d "$2" ]; then
            for inner in "$1"/* "$1"/.[!.]* "$1"/..?*; do
                if [ -e "$inner" ] || [ -h "$inner" ]; then place "$inner" "$2/${inner##*/}"; fi
            done
            return
        fi
        [ ! -e "$2" ] || fail "$2: not a directory"
    elif [ -d "$2" ]; then
        fail "$2: is a directory"
    elif [ -f "$1" ] && [ ! -h "$1" ] && [ -f "$2" ] && [ ! -h "$2" ]; then
        mode=$(stat -c %a "$2" 2>/dev/null) && chmod "$mode" "$1"
    fi
    mv -f "$1" "$2" || exit 1
}
trap 'rm -rf "$made"' EXIT
trap 'exit 1' HUP INT TERM
mkdir -m 700 "$made" 2>/dev/null || { said=$(mkdir "$made" 2>&1); fail "$parent: ${said##*: }"; }
tar -x -f - -C "$made" && place "$made/x" "$final"
"""
)

#: $1 directory, $2 name in it, $3 its name as given, $4 a unique name.
GET = (
    PROLOGUE
    + r"""
plain "$3"; shown=$plain
cd -P "$at" 2>/dev/null && { [ -e "./$name" ] || [ -h "./$name" ]; } || fail "$shown: No such file or directory"
if [ ! -h "./$name" ]; then
    [ -S "./$name" ] && fail "$shown: a socket cannot be copied"
    { [ -b "./$name" ] || [ -c "./$name" ]; } && fail "$shown: a device cannot be copied"
fi
case $PWD/$name in
/proc/*|/sys/*)
    for made in /tmp /dev/shm /run /var/tmp; do [ -w "$made" ] && break; done
    made=$made/.caisson-$4
    trap 'kill $! 2>/dev/null; rm -rf "$made"' EXIT
    trap 'exit 1' HUP INT TERM
    mkdir -m 700 "$made" || exit 1
    cp -r "./$name" "$made/x" || exit 1
    if [ "$name" = . ]; then cd "$made/x"; else mv "$made/x" "$made/$name"; cd "$made"; fi
    tar -c -f - "./$name" &
    wait $!
    exit
esac
exec tar -c -f - "./$name"
"""
)
