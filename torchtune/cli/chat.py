"""`tune chat DIR [key=value ...]`: a conversation with a model in the terminal."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from torchtune.cli.tune import tell
from torchtune.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torchtune.recipes.chat import Chat

USAGE = """\
usage: tune chat DIR [key=value ...]

  DIR                      a checkpoint: a folder, a GGUF file, a hub id, an adapter's folder
  system="..."             the system message
  temperature=0.7 top_p=0.9 max_new_tokens=512 stop=... seed=...   how answers are chosen
  chat_template, chat_template_kwargs, adapter, dtype, device      as of tune run generate
"""
HELP = """\
/reset          forget what was said
/system TEXT    another system message, and a new conversation; without TEXT none
/undo           forget the last question and its answer
/history        show what was said
/save FILE      write it as a row for training: {"messages": [...]}
/quit           end; Ctrl-D too. Ctrl-C stops an answer.
"""


def run(argv: list[str]) -> int:
    """Talk until the input ends."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    from torchtune.config.parse import parse_params
    from torchtune.recipes.chat import Chat, ChatParams

    first, rest = argv[0], argv[1:]
    keys = [first, *rest] if "=" in first else [f"model_checkpoint={first}", *rest]
    chat = Chat(parse_params(ChatParams, keys))
    if sys.stdin.isatty():
        tell(f"{chat.name}: /help lists what else there is to say, Ctrl-D ends")
        if importlib.util.find_spec("readline"):
            import readline  # noqa: F401  # input() edits lines and remembers them
    while (text := _ask()) is not None:
        try:
            if text.startswith("/"):
                if not _command(chat, text):
                    return 0
            elif text.strip():
                _answer(chat, text)
        except (ConfigError, DataError, OSError) as error:
            tell(str(error))
    return 0


def _ask() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        if sys.stdin.isatty():
            print()
        return None
    except KeyboardInterrupt:
        print()
        return ""


def _answer(chat: Chat, text: str) -> None:
    try:
        for piece in chat.say(text):
            print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        print(" [stopped]")


def _command(chat: Chat, text: str) -> bool:
    """Do what a line that begins with / says; whether the conversation goes on."""
    name, _, rest = text[1:].partition(" ")
    commands: dict[str, Callable[[], object]] = {
        "reset": chat.reset,
        "system": lambda: chat.reset(system=rest.strip()),
        "undo": chat.undo,
        "history": lambda: print(chat.history()),
        "save": lambda: chat.save(rest.strip()),
        "help": lambda: print(HELP),
    }
    if name in ("quit", "exit", "q"):
        return False
    if name not in commands:
        raise ConfigError(f"there is no /{name}; there are /{', /'.join([*commands, 'quit'])}", where="chat")
    commands[name]()
    return True
