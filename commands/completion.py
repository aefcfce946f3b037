"""Complete command lines in bash, zsh and fish: the shells ask `caisson complete`, which reads the declarations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from caisson.commands.declare import HELP, Command, Kind, Option

#: Placeholders for file names: the shell completes these itself.
FILES = {"file": ":file", "directory": ":directory"}

#: Looks up names of a kind ("vm", "snapshot", …), given the values so far.
Lookup = Callable[[str, Mapping[str, str]], Sequence[str]]

BASH = """\
# bash completion of caisson; load it with: source <(caisson completion bash)
_caisson() {
    local line current=${COMP_WORDS[COMP_CWORD]}
    [[ $current == = ]] && current=
    COMPREPLY=()
    while IFS= read -r line; do
        case $line in
            :file) compopt -o filenames; mapfile -t -O ${#COMPREPLY[@]} COMPREPLY < <(compgen -f -- "$current") ;;
            :directory) compopt -o filenames; mapfile -t -O ${#COMPREPLY[@]} COMPREPLY < <(compgen -d -- "$current") ;;
            *) COMPREPLY+=("${line%%$'\\t'*}") ;;
        esac
    done < <("${COMP_WORDS[0]}" complete -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
}
complete -F _caisson caisson
"""

ZSH = """\
#compdef caisson
# zsh completion of caisson; load it with: source <(caisson completion zsh)
_caisson() {
    local line
    local -a lines found
    lines=("${(@f)$("${words[1]}" complete -- "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    for line in $lines; do
        case $line in
            :file) _files ;;
            :directory) _files -/ ;;
            *) found+=("${${line%%$'\\t'*}//:/\\\\:}:${line#*$'\\t'}") ;;
        esac
    done
    (( $#found )) && _describe caisson found
}
if [[ $funcstack[1] == _caisson ]]; then _caisson "$@"; else compdef _caisson caisson; fi
"""

FISH = """\
# fish completion of caisson; load it with: caisson completion fish | source
function __caisson_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    for line in ($words[1] complete -- $words[2..-1] "$current" 2>/dev/null)
        switch $line
            case ':file'
                __fish_complete_path "$current"
            case ':directory'
                __fish_complete_directories "$current" ''
            case '*'
                echo $line
        end
    end
end
complete -c caisson -f -a '(__caisson_complete)'
"""

SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def complete(commands: Mapping[str, Command], words: Sequence[str], lookup: Lookup) -> list[str]:
    """Return the completions of the last word: lines of "WORD<tab>description", and :file or :directory.

    ``words`` are those after the program's name, as the shell splits them; bash makes `--name`, `=`, `we` of
    `--name=we` and wants only what replaces the last of them.
    """
    joined, split = _join_equals(words)
    *before, current = joined or [""]
    if not before:
        found = [(one.name, one.summary) for one in commands.values() if not one.hidden]
        return _matching([*found, ("--help", "show the commands"), ("--version", "show the version")], current)
    command = commands.get(before[0])
    if command is None:
        return []
    return _Completer(command, lookup).complete(before[1:], current, bare=split)


def _join_equals(words: Sequence[str]) -> tuple[list[str], bool]:
    joined: list[str] = []
    split = False
    for word in words:
        split = (
            len(joined) > 0 and joined[-1].startswith("--") and (word == "=" or (joined[-1].endswith("=") and split))
        )
        if split:
            joined[-1] += word
        else:
            joined.append(word)
    return joined, split


def _matching(found: Sequence[tuple[str, str]], current: str) -> list[str]:
    return [f"{word}\t{text}" for word, text in found if word.startswith(current)]


class _Completer:
    def __init__(self, command: Command, lookup: Lookup) -> None:
        self.command = command
        self.lookup = lookup
        self.values: dict[str, str] = {}

    def complete(self, before: Sequence[str], current: str, *, bare: bool) -> list[str]:
        places = list(self.command.positionals)
        pending: Option | None = None
        for word in before:
            if pending:
                self.values[pending.name] = word
                pending = None
            elif word == "--" and self.command.program:
                return []  # the program's own words
            elif word.startswith("-") and word != "-":
                pending = self._option(word)
            elif places:
                place = places[0] if places[0].repeat else places.pop(0)
                self.values[place.name] = word
            elif self.command.program:
                return []
        if pending and pending.kind:
            return self._values(pending.kind, current, "")
        if current.startswith("-"):
            name, equals, value = current.partition("=")
            option = self._find(name)
            if equals:
                return self._values(option.kind, value, "" if bare else f"{name}=") if option and option.kind else []
            return _matching([(f"--{one.name}", one.help) for one in (*self.command.options, HELP)], current)
        return self._values(places[0].kind, current, "") if places else []

    def _find(self, name: str) -> Option | None:
        for option in self.command.options:
            if name in (f"--{option.name}", f"-{option.short}"):
                return option
        return None

    def _option(self, word: str) -> Option | None:
        """Record an option with its value; returns one whose value comes next."""
        name, equals, value = word.partition("=")
        option = self._find(name)
        if option is None or option.kind is None:
            return None
        if equals:
            self.values[option.name] = value
            return None
        return option

    def _values(self, kind: Kind, current: str, prefix: str) -> list[str]:
        if kind.complete in FILES:
            return [FILES[kind.complete]]
        words = kind.choices or (self.lookup(kind.complete, self.values) if kind.complete else ())
        return [f"{prefix}{word}\t" for word in words if word.startswith(current)]
