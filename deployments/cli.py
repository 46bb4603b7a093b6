"""The command `briolette`: up, status, chat, sessions, usage, keys, down, demo, verify."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.markup import escape

from cluster.config import Config
from cluster.config_values import parse_overrides
from cluster.errors import BrioletteError, InvalidRequest
from deployments.commands import access, key_options
from deployments.start import lifecycle
from deployments.start.lifecycle import Running

# Modules that import grpc or torch are imported by the command that needs them, so that
# `briolette --help` is instant.

DEMO_QUESTIONS = (
    "Please remember that the code of Anna is 4821.",
    "What is the capital of Norway?",
    "What is 27 + 58?",
    "What is the code of Anna?",
)

console = Console(highlight=False)


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: The command line without the program's name; None takes that of this process.

    Returns:
        The exit code: 0, 1 for a failure, 130 for Ctrl-C.
    """
    args = make_parser().parse_args(arguments)
    command: Callable[[Config, argparse.Namespace], int] = args.command
    end_as_ctrl_c()
    try:
        config = Config.load(args.config, parse_overrides(args.set))
        return command(config, args)
    except BrioletteError as error:
        Console(stderr=True, highlight=False).print(f"[red]error:[/] {escape(str(error))}")
        return 1
    except KeyboardInterrupt:
        return 130


def end_as_ctrl_c() -> None:
    """Let SIGTERM and a closed terminal clean up as Ctrl-C does.

    Further signals are ignored: a shell repeats the terminal's, which would interrupt the cleanup.
    A signal that is ignored already (`nohup`) stays ignored.
    """

    def interrupt(*_: object) -> None:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)


def up(config: Config, args: argparse.Namespace) -> int:
    """Start the cluster and leave it running in the background."""
    running = lifecycle.find_running(config.state_dir)
    if running is not None:
        where = f"listens on {running.address}" if running.address else "is still starting"
        model = escape(running.model)
        console.print(f"Already running: {model} {where} (supervisor pid {running.pid}).")
        return 0
    running = _start(config)
    console.print(f"Serving {escape(running.model)} on {running.address} (gRPC).")
    if running.base_url is not None:
        console.print(f"Chat page: {running.base_url.removesuffix('v1')}")
        console.print(f"OpenAI's clients: base_url={running.base_url}")
    if config.gateway.auth == "keys":
        create = _hint(config, "keys create NAME")
        console.print(f"Callers need a key: {create}", markup=False, soft_wrap=True)
    ask, stop = _hint(config, 'chat "What is 27 + 58?"'), _hint(config, "down")
    console.print(f"Try: {ask}     Stop it: {stop}", markup=False, soft_wrap=True)
    return 0


def down(config: Config, args: argparse.Namespace) -> int:
    """Stop the cluster."""
    with console.status("Stopping ..."):
        was_running = lifecycle.stop(config.state_dir)
    console.print("Stopped." if was_running else "Nothing is running.")
    return 0


def status(config: Config, args: argparse.Namespace) -> int:
    """Show the model, the processes of the cluster, the queue and the speed."""
    from deployments.commands.cards import status_card
    from deployments.commands.connect import connect_here

    running = lifecycle.find_running(config.state_dir)
    if running is None or running.address is None:
        absent = f"Nothing is running; start it: {_hint(config, 'up')}"
        console.print("Starting." if running else absent, markup=False, soft_wrap=True)
        return 1
    with connect_here(config) as client:
        answer = client.status()
    console.print(status_card(answer, running.address, running.started, running.base_url))
    return 0 if answer.ready else 1


def chat(config: Config, args: argparse.Namespace) -> int:
    """Ask the model a question, or hold a conversation with it."""
    from deployments.commands.chat import Conversation
    from deployments.commands.connect import connect
    from protos.briolette.v1.inference_pb2 import Sampling

    sampling = Sampling(temperature=args.temperature, seed=args.seed, max_tokens=args.max_tokens)
    with connect(config, args) as client:
        conversation = Conversation(client, sampling, console, args.session, args.think)
        if args.question:
            conversation.ask(" ".join(args.question))
        else:
            conversation.run()
    return 0


def sessions(config: Config, args: argparse.Namespace) -> int:
    """List sessions (conversations that the server keeps), or show, park, resume or delete one."""
    from deployments.commands.connect import connect
    from deployments.commands.sessions import COMMANDS

    if args.action != "list" and args.name is None:
        raise InvalidRequest(f"The name is missing: briolette sessions {args.action} NAME")
    with connect(config, args) as client:
        COMMANDS[args.action](client, args.name or "", console)
    return 0


def usage(config: Config, args: argparse.Namespace) -> int:
    """Show the requests and tokens of each tenant by day."""
    from deployments.commands.connect import connect
    from deployments.commands.usage import print_table, write_csv

    with connect(config, args) as client:
        days = client.usage(args.tenant, args.since)
    if args.csv:
        write_csv(days, sys.stdout)
    else:
        print_table(days, console)
    return 0


def keys(config: Config, args: argparse.Namespace) -> int:
    """List tenants, or create, change, disable, enable or delete one; rotate its API key."""
    from deployments.commands.connect import connect
    from deployments.commands.keys import COMMANDS

    key_options.check(args)
    with connect(config, args) as client:
        COMMANDS[args.action](client, args, console)
    return 0


def demo(config: Config, args: argparse.Namespace) -> int:
    """Start a cluster, hold a short conversation, show its timings, and stop it."""
    from deployments.commands.cards import demo_card
    from deployments.commands.chat import Conversation
    from deployments.commands.connect import connect_here
    from protos.briolette.v1.inference_pb2 import Sampling

    found = lifecycle.find_running(config.state_dir)
    if found is None:
        _start(config)
    try:
        with connect_here(config) as client:
            conversation = Conversation(client, Sampling(temperature=0.0, max_tokens=64), console)
            answers = []
            for question in DEMO_QUESTIONS:
                console.print(f"[bold]>[/] {question}")
                answers.append(conversation.ask(question))
            console.print(demo_card(_settled(client), answers))
    finally:
        if found is None:
            lifecycle.stop(config.state_dir)  # before printing: the terminal may be gone
            console.print("Stopped.")
    return 0


def verify(config: Config, args: argparse.Namespace) -> int:
    """Check that cached answers, from memory and from Redis, equal uncached ones bit by bit."""
    from deployments.commands.cards import StartDisplay
    from deployments.verify import verify as verification
    from deployments.verify.card import print_report

    config = config.model_copy(update={"batch_invariant": args.batch_invariant})
    with StartDisplay(console) as display:
        report = verification.verify(config, args.prompts, display.show)
    print_report(console, report)
    return 0 if report.is_warm and (report.is_equal or not args.batch_invariant) else 1


def _settled(client: Any) -> Any:
    """Return a status that counts the last answer: decoders send one every second."""
    import time

    time.sleep(1.2)
    return client.status()


def _start(config: Config) -> Running:
    from deployments.commands.cards import StartDisplay

    try:
        with StartDisplay(console) as display:
            return lifecycle.start(config, display.show)
    except KeyboardInterrupt:
        console.print("Interrupted; everything that was started has been stopped.")
        raise


def make_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line; the reference page is generated from it."""
    parser = argparse.ArgumentParser(
        prog="briolette", description="Serve a Gemma 4 model on this machine."
    )
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _command(commands, up)
    _command(commands, status)
    _add_chat_options(_command(commands, chat))
    _add_session_options(_command(commands, sessions))
    _add_usage_options(_command(commands, usage))
    tenants = _command(commands, keys)
    key_options.add_options(tenants)
    access.add_options(tenants)
    _command(commands, down)
    _command(commands, demo)
    _add_verify_options(_command(commands, verify))
    return parser


def _add_chat_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("question", nargs="*", help="what to ask; left out, a conversation starts")
    add("--session", default="", metavar="NAME", help="begin or continue a session")
    add("--think", action="store_true", help="let the model think before it answers")
    access.add_options(parser)
    add("--temperature", type=float, default=0.0, help="0 is greedy; default: 0")
    add("--seed", type=int, help="seed of the sampling, for repeatable answers")
    add("--max-tokens", type=int, help="limit of the answer's length")


def _add_session_options(parser: argparse.ArgumentParser) -> None:
    actions = ("list", "show", "park", "resume", "delete")
    parser.add_argument("action", nargs="?", choices=actions, default="list", help="default: list")
    parser.add_argument("name", nargs="?", metavar="NAME", help="name of the session")
    access.add_options(parser)


def _add_usage_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--tenant", default="", metavar="NAME", help="default: every tenant that you may see")
    add("--since", default="", metavar="DAY", help="as in 2026-11-24; default: 30 days ago")
    add("--csv", action="store_true", help="print CSV instead of a table")
    access.add_options(parser)


def _add_verify_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='prompts in place of the shipped ones; each line: {"turns": ["…"]} or {"prompt": "…"}',
    )
    parser.add_argument(
        "--batch-invariant",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="--no-batch-invariant only reports differences; default: a difference is a failure",
    )


class _ShowVersion(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(f"briolette {metadata.version('briolette')}")
        parser.exit()


def _hint(config: Config, words: str) -> str:
    """Return a command line that reaches the cluster of this configuration."""
    is_default = config.state_dir == Config().state_dir
    return f"briolette {words}" + (
        "" if is_default else f" --set {shlex.quote(f'state_dir={config.state_dir}')}"
    )


def _command(commands: Any, function: Callable[[Config, argparse.Namespace], int]) -> Any:
    about = function.__doc__
    parser = commands.add_parser(function.__name__, help=about, description=about)
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML configuration; every key has a default"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set one key of the configuration",
    )
    parser.set_defaults(command=function)
    return parser


if __name__ == "__main__":
    sys.exit(main())
