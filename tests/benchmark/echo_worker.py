"""Worker for test_workers.py; run as a process of its own."""

import sys

from benchmark.workers.pipe import Json, answer_questions


def handle(question: Json) -> Json:
    print("noise on stdout")
    if question.get("die"):
        sys.exit("the worker died on purpose")
    return {"echo": question}


if __name__ == "__main__":
    answer_questions(handle)
