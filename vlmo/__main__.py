"""All commands of VLMo under one name.

vlmo COMMAND ...          or python -m vlmo COMMAND ...
vlmo COMMAND --help       what it takes
vlmo completion SHELL     for bash or zsh: eval "$(vlmo completion bash)"
"""

import difflib
import importlib
import sys
from collections.abc import Sequence

from vlmo.errors import print_error

# its module, whose `main` takes the arguments and gives the exit status; and what it does
COMMANDS = {
    "train": ("vlmo.train", "pre-train, fine-tune or evaluate a named config, as `python run.py` does"),
    "predict": ("vlmo.predict", "use a checkpoint: answer, match, rank, classify, embed, ..."),
    "app": ("vlmo.app.__main__", "a page to try checkpoints and to look at data"),
    "convert": ("vlmo.utils.convert", "make Arrow tables of a data set or of your own data"),
    "doctor": ("vlmo.doctor", "look at everything that a run needs before it starts"),
    "evaluate": ("vlmo.evaluate", "score a checkpoint on suites: retrieval, compositionality, zero-shot, probes"),
    "report": ("vlmo.report", "write the report of a run again, or compare runs on one page"),
    "checkpoint": ("vlmo.checkpoint", "show and verify a checkpoint, write it in another form, share it"),
    "export": ("vlmo.export.__main__", "write a checkpoint as graphs for ONNX Runtime or OpenVINO, also in INT8"),
    "serve": ("vlmo.serve.__main__", "answer requests over HTTP with a checkpoint or an export"),
    "demo": ("vlmo.demo.__main__", "take a small generated world through every stage"),
}

# `@words@` are what follows "with": named configs, and options with "="
COMPLETION = """
_vlmo() {
    local word=${COMP_WORDS[COMP_CWORD]} words="@commands@"
    case " ${COMP_WORDS[*]:1:$((COMP_CWORD - 1))} " in
        *" with "*) words="@words@" ;;
        *" train "*|*" doctor "*) words="with print_config --help" ;;
        *" completion "*) words="bash zsh" ;;
    esac
    if ((COMP_CWORD > 1)) && [[ $words == "@commands@" ]]; then COMPREPLY=(); return; fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace 2> /dev/null
}
complete -o default -F _vlmo vlmo
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Hands the arguments to the command that the first of them names; returns its exit status."""
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(f"{__doc__}\nCommands:")
        for command, (_, summary) in COMMANDS.items():
            print(f"  {command:<12}{summary}")
        return 0
    if name == "--version":
        print(importlib.import_module("vlmo").__version__)
        return 0
    if name == "completion":
        return completion(rest)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join([*COMMANDS, 'completion'])}"
        return print_error(f"vlmo {name}: no such command; {hint}")
    return importlib.import_module(COMMANDS[name][0]).main(rest)


def completion(arguments: Sequence[str]) -> int:
    """Prints what a shell completes commands, named configs and options with."""
    if list(arguments) not in (["bash"], ["zsh"]):
        return print_error("vlmo completion: for which shell? bash or zsh")
    from vlmo.config import ex
    from vlmo.settings import Settings

    words = [*sorted(ex.named_configs), *(f"{option}=" for option in sorted(Settings.defaults()))]
    if arguments[0] == "zsh":
        print("autoload -U +X bashcompinit && bashcompinit")
    print(COMPLETION.replace("@commands@", " ".join([*COMMANDS, "completion"])).replace("@words@", " ".join(words)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
