"""A conversation on a terminal, streamed."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from cluster.errors import BrioletteError, InvalidRequest, Unavailable, UnknownSession
from deployments.commands.cards import Answer
from deployments.commands.client import Client
from protos.briolette.v1.inference_pb2 import Generation, Message, Sampling


class Conversation:
    """Keeps the messages; each question goes out with all that was said before. In a session the
    server keeps them, and the question goes out alone. With `thinking` the model thinks before it
    answers, which is shown dimmed.
    """

    def __init__(
        self,
        client: Client,
        sampling: Sampling,
        console: Console,
        session: str = "",
        thinking: bool = False,
    ) -> None:
        self._client = client
        self._thinking = thinking
        self._session = session
        self._sampling = sampling
        self._console = console
        self._messages: list[Message] = []

    def ask(self, question: str) -> Answer:
        """Print the answer as it comes. A failed question leaves the conversation as it was."""
        messages = [*self._messages, Message(role="user", content=question)]
        text, thought, num_tokens, piece = "", "", 0, Generation()
        pieces = self._client.chat(messages, self._sampling, self._session, thinking=self._thinking)
        try:
            for piece in pieces:
                self._console.out(piece.thought, style="dim", end="", highlight=False)
                thought += piece.thought
                if thought and piece.text and not text:
                    self._console.out("\n")
                self._console.out(piece.text, end="", highlight=False)
                text += piece.text
                num_tokens += len(piece.token_ids)
        finally:
            self._console.out("")
        if not num_tokens:
            raise Unavailable("The model gave no answer.")
        if not self._session:
            self._messages = [*messages, Message(role="assistant", content=text)]
        return Answer.of(piece, num_tokens)

    def run(self) -> None:
        """Ask what the user types until the end of input."""
        import readline  # noqa: F401  # gives input() a history and editing

        if self._session:
            self._console.print(f"{self._so_far()} Ctrl-C ends an answer, Ctrl-D the conversation.")
        else:
            self._console.print(
                "Ask something. /new starts over, Ctrl-C ends an answer, Ctrl-D the conversation."
            )
        while True:
            try:
                question = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                self._console.out("")
                return
            if not question:
                continue
            if question == "/new":
                self._start_over()
                continue
            try:
                answer = self.ask(question)
                self._console.print(
                    f"[dim]{answer.num_tokens} tokens, first after {answer.ttft_s * 1e3:.0f} ms, "
                    f"{answer.tokens_per_s:.0f} tokens/s[/]"
                )
            except KeyboardInterrupt:
                continue
            except BrioletteError as error:
                self._console.print(f"[red]{escape(str(error))}[/]")
                if self._messages and isinstance(error, InvalidRequest):
                    self._console.print("/new starts over with an empty context.")

    def _start_over(self) -> None:
        self._messages = []
        if self._session:
            self._console.print("This session goes on; another --session begins another one.")

    def _so_far(self) -> str:
        try:
            kept = self._client.get_session(self._session)
        except UnknownSession as error:
            return f"{escape(str(error))} The first question begins it."
        num_messages, num_tokens = len(kept.messages), kept.session.num_tokens
        return f"The session goes on after {num_messages} messages, {num_tokens:,} tokens."
