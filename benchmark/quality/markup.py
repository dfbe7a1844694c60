"""Chat markup of a model, cut into the pieces that prompts are assembled from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tca_runtime.tokenizer.chat import ChatTemplate


@dataclass(frozen=True)
class Markup:
    """What comes before the first user text, between texts, and before an answer.

    Attributes
    ----------
    head : up to the first user text
    answer : from a user text to the answer
    question : from an answer to the next user text
    """

    head: str
    answer: str
    question: str

    @staticmethod
    def of(tokenizer: Any) -> Markup:
        """Read the pieces off the rendering of a conversation with marks in it."""
        marks = ["\u27e6first\u27e7", "\u27e6second\u27e7", "\u27e6third\u27e7"]
        roles = ("user", "assistant", "user")
        messages = [{"role": r, "content": m} for r, m in zip(roles, marks, strict=True)]
        text = ChatTemplate(tokenizer).render(messages)
        head, text = text.split(marks[0])
        answer, text = text.split(marks[1])
        question, tail = text.split(marks[2])
        if tail != answer:
            raise ValueError(f"the chat template treats turns unlike: {tail!r} and {answer!r}")
        return Markup(head, answer, question)

    def prompt(self, user: str, prefix: str = "") -> str:
        """One turn, whose answer is made to begin with ``prefix``."""
        return self.head + user + self.answer + prefix
