"""cni-portmap completion: generated from the parser, so that it knows every command and option."""
import argparse

from ..linux.kernel import Kernel

HELP = "print the completion script for a shell"
SCRIPT = """\
# Completion of cni-portmap for bash; written by: cni-portmap completion bash
_cni_portmap() {
    local word=${COMP_WORDS[COMP_CWORD]} options
    case $([ "$COMP_CWORD" -gt 1 ] && echo "${COMP_WORDS[1]}") in
%s        *) options="%s" ;;
    esac
    mapfile -t COMPREPLY < <(compgen -W "$options" -- "$word")
    [ ${#COMPREPLY[@]} -gt 0 ] || mapfile -t COMPREPLY < <(compgen -f -- "$word")
}
complete -F _cni_portmap cni-portmap
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the argument."""
    parser.add_argument("shell", choices=["bash"], help="the name of the shell")


def run(options: argparse.Namespace, kernel: Kernel) -> int:
    """Print the script."""
    from .main import COMMANDS, parser
    commands = next(action for action in parser()._actions if isinstance(action, argparse._SubParsersAction)).choices
    lines = "".join(f'        {name}) options="{" ".join(_words(commands[name]))}" ;;\n' for name in COMMANDS)
    print(SCRIPT % (lines, " ".join((*COMMANDS, "--help"))), end="")
    return 0


def _words(parser: argparse.ArgumentParser) -> list[str]:
    """The words that can follow a command: choices first, then the long options."""
    choices = [str(word) for action in parser._actions if not action.option_strings for word in action.choices or ()]
    return choices + [option for action in parser._actions for option in action.option_strings
                      if option.startswith("--")]
