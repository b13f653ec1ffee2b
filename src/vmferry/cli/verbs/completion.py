"""Prints the completion of the command line for a shell, made from the parsers.

bash: `source <(vmferry completion bash)`; zsh: the same; fish: `vmferry completion fish | source`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from vmferry.cli.exit_codes import ExitCode
from vmferry.cli.output import Output

HELP = "print the completion for a shell"
SHELLS = ("bash", "zsh", "fish")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="the shell")


async def run(args: argparse.Namespace, output: Output) -> ExitCode:
    from vmferry.cli.arguments import parser

    output.text(script(args.shell, verbs_of(parser({}))))
    return ExitCode.OK


def verbs_of(top: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser of each verb."""
    (action,) = [one for one in top._actions if isinstance(one, argparse._SubParsersAction)]
    return dict(action.choices)


def script(shell: str, verbs: Mapping[str, argparse.ArgumentParser]) -> str:
    """The script that a shell reads."""
    return _fish(verbs) if shell == "fish" else _bash(verbs, shell)


def _options(parser: argparse.ArgumentParser) -> list[str]:
    return [option for action in parser._actions for option in action.option_strings if option.startswith("--")]


def _bash(verbs: Mapping[str, argparse.ArgumentParser], shell: str) -> str:
    """bash, and zsh by its bashcompinit."""
    head = ["autoload -U +X bashcompinit && bashcompinit"] if shell == "zsh" else []
    cases = [f"    {verb}) words={_quoted(_options(parser))} ;;" for verb, parser in verbs.items()]
    return "\n".join(
        [
            *head,
            "_vmferry() {",
            "  local word words verb=",
            '  for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do',
            '    case "$word" in -*) ;; *) verb=$word; break ;; esac',
            "  done",
            '  case "$verb" in',
            f'    "") words={_quoted([*verbs, "--version", "--help"])} ;;',
            *cases,
            "  esac",
            '  COMPREPLY=($(compgen -W "$words" -- "${COMP_WORDS[COMP_CWORD]}"))',
            "}",
            "complete -F _vmferry vmferry",
        ]
    )


def _fish(verbs: Mapping[str, argparse.ArgumentParser]) -> str:
    lines = ["complete -c vmferry -f"]
    for verb, parser in verbs.items():
        about = (parser.description or "").split(".")[0].replace("'", "")
        lines.append(f"complete -c vmferry -n __fish_use_subcommand -a {verb} -d '{about}'")
        for option in _options(parser):
            lines.append(f"complete -c vmferry -n '__fish_seen_subcommand_from {verb}' -l {option[2:]}")
    return "\n".join(lines)


def _quoted(words: list[str]) -> str:
    return '"' + " ".join(words) + '"'
