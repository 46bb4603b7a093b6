"""The command `briolette`: up, status, chat, sessions, usage, keys, down, demo, verify."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from cluster.config import Config
from cluster.config_values import parse_overrides
from cluster.errors import BrioletteError, InvalidRequest
from deployments.commands import access, key_options
from deployments.start import lifecycle
from deployments.start.lifecycle import Running

# What brings grpc or torch along is imported by the command that needs it: --help is instant.

DEMO_QUESTIONS = (
    "Please remember that the code of Anna is 4821.",
    "What is the capital of Norway?",
    "What is 27 + 58?",
    "What is the code of Anna?",
)

console = Console(highlight=False)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 for a failure, 130 for Ctrl-C."""
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
    """Let SIGTERM and a closed terminal clean up as Ctrl-C does. The first one counts: the shell
    repeats the terminal's, and the cleaning up must not be broken off. `nohup` stays in force.
    """

    def interrupt(*_: object) -> None:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)


def up(config: Config, args: argparse.Namespace) -> int:
    """Start the cluster and leave it running."""
    running = lifecycle.find_running(config.state_dir)
    if running is not None:
        where = f"listens on {running.address}" if running.address else "is still starting"
        model = escape(running.model)
        console.print(f"Already running: {model} {where} (supervisor pid {running.pid}).")
        return 0
    running = _start(config)
    console.print(f"Serving {escape(running.model)} on {running.address} (gRPC).")
    if running.base_url is not None:
        console.print(f"OpenAI's clients: base_url={running.base_url}")
    if config.gateway.auth == "keys":
        console.print("Everybody else needs a key: briolette keys create NAME")
    console.print('Try: briolette chat "What is 27 + 58?"     Stop it: briolette down')
    return 0


def down(config: Config, args: argparse.Namespace) -> int:
    """Stop the cluster."""
    with console.status("Stopping ..."):
        was_running = lifecycle.stop(config.state_dir)
    console.print("Stopped." if was_running else "Nothing is running.")
    return 0


def status(config: Config, args: argparse.Namespace) -> int:
    """Show the model, where attention and experts run, the queue and the speed."""
    from deployments.commands.cards import status_card

    running = lifecycle.find_running(config.state_dir)
    if running is None or running.address is None:
        console.print("Starting." if running else "Nothing is running; start it: briolette up")
        return 1
    with access.connect_here(config) as client:
        answer = client.status()
    console.print(status_card(answer, running.address, running.started, running.base_url))
    return 0 if answer.ready else 1


def chat(config: Config, args: argparse.Namespace) -> int:
    """Talk to the model."""
    from deployments.commands.chat import Conversation
    from protos.briolette.v1.inference_pb2 import Sampling

    sampling = Sampling(temperature=args.temperature, seed=args.seed, max_tokens=args.max_tokens)
    with access.connect(config, args) as client:
        conversation = Conversation(client, sampling, console, args.session, args.think)
        if args.question:
            conversation.ask(" ".join(args.question))
        else:
            conversation.run()
    return 0


def sessions(config: Config, args: argparse.Namespace) -> int:
    """List the conversations that are kept, or show, park, resume or delete one."""
    from deployments.commands.sessions import COMMANDS

    if args.action != "list" and args.name is None:
        raise InvalidRequest(f"Which one? briolette sessions {args.action} NAME")
    with access.connect(config, args) as client:
        COMMANDS[args.action](client, args.name or "", console)
    return 0


def usage(config: Config, args: argparse.Namespace) -> int:
    """Show what each tenant used on each day."""
    from deployments.commands.usage import print_table, write_csv

    with access.connect(config, args) as client:
        days = client.usage(args.tenant, args.since)
    if args.csv:
        write_csv(days, sys.stdout)
    else:
        print_table(days, console)
    return 0


def keys(config: Config, args: argparse.Namespace) -> int:
    """List the tenants, or create, change, rotate the key of, disable, enable or delete one."""
    from deployments.commands.keys import COMMANDS

    key_options.check(args)
    with access.connect(config, args) as client:
        COMMANDS[args.action](client, args, console)
    return 0


def demo(config: Config, args: argparse.Namespace) -> int:
    """Start the cluster, hold a conversation, show the numbers, stop it again."""
    from deployments.commands.cards import demo_card
    from deployments.commands.chat import Conversation
    from protos.briolette.v1.inference_pb2 import Sampling

    found = lifecycle.find_running(config.state_dir)
    if found is None:
        _start(config)
    try:
        with access.connect_here(config) as client:
            conversation = Conversation(client, Sampling(temperature=0.0, max_tokens=64), console)
            answers = []
            for question in DEMO_QUESTIONS:
                console.print(f"[bold]>[/] {question}")
                answers.append(conversation.ask(question))
            console.print(demo_card(_settled(client), answers))
    finally:
        if found is None:
            lifecycle.stop(config.state_dir)  # says nothing before: the terminal may be gone
            console.print("Stopped.")
    return 0


def verify(config: Config, args: argparse.Namespace) -> int:
    """Hold warm answers, from memory and from Redis, to cold ones; needs no running cluster."""
    from deployments.commands.cards import StartDisplay
    from deployments.verify import verify as verification
    from deployments.verify.card import print_report

    config = replace(config, batch_invariant=args.batch_invariant)
    with StartDisplay(console) as display:
        report = verification.verify(config, args.prompts, display.show)
    print_report(console, report)
    return 0 if report.is_warm and (report.is_equal or not args.batch_invariant) else 1


def _settled(client: Any) -> Any:
    """The status after the last answer: it is sent once a second."""
    import time

    time.sleep(1.2)
    return client.status()


def _start(config: Config) -> Running:
    from deployments.commands.cards import StartDisplay

    try:
        with StartDisplay(console) as display:
            return lifecycle.start(config, display.show)
    except KeyboardInterrupt:
        console.print("Interrupted; everything that was started is stopped.")
        raise


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="briolette", description="Serve a Gemma 4 model from the cards that you have."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _command(commands, up)
    _command(commands, status)
    talk = _command(commands, chat)
    talk.add_argument("question", nargs="*", help="ask this one question, then end")
    talk.add_argument("--session", default="", metavar="NAME", help="a conversation that is kept")
    talk.add_argument("--think", action="store_true", help="let the model think before it answers")
    access.add_options(talk)
    talk.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    talk.add_argument("--seed", type=int, help="makes sampling repeatable")
    talk.add_argument("--max-tokens", type=int, help="longest answer")
    kept = _command(commands, sessions)
    actions = ("list", "show", "park", "resume", "delete")
    kept.add_argument("action", nargs="?", choices=actions, default="list", help="default: list")
    kept.add_argument("name", nargs="?", metavar="NAME", help="of the session")
    access.add_options(kept)
    used = _command(commands, usage)
    used.add_argument("--tenant", default="", metavar="NAME", help="default: all that you may see")
    used.add_argument("--since", default="", metavar="DAY", help="default: 30 days ago")
    used.add_argument("--csv", action="store_true", help="comma-separated, for other programs")
    access.add_options(used)
    tenants = _command(commands, keys)
    key_options.add_options(tenants)
    access.add_options(tenants)
    _command(commands, down)
    _command(commands, demo)
    check = _command(commands, verify)
    check.add_argument(
        "--prompts", type=Path, help='a file of lines like {"turns": ["…"]} or {"prompt": "…"}'
    )
    check.add_argument(
        "--batch-invariant",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="without it differences are shown and are no failure",
    )
    return parser


def _command(commands: Any, function: Callable[[Config, argparse.Namespace], int]) -> Any:
    parser = commands.add_parser(function.__name__, help=function.__doc__)
    parser.add_argument("--config", type=Path, help="a YAML file; every key has a default")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one key"
    )
    parser.set_defaults(command=function)
    return parser


if __name__ == "__main__":
    sys.exit(main())
